"""Tiny models for tests: every combination of the closed tables, at sizes that run in milliseconds."""

from __future__ import annotations

import itertools
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from continuar.backbones import BackboneConfig, MAEConfig
from continuar.checkpoints.store import ModelFile
from continuar.generation.plan import SamplingOptions
from continuar.heads import DiffusionHeadConfig, HeadConfig
from continuar.model import Model, ModelConfig
from continuar.orders import OrderConfig
from continuar.tokenizers import PixelConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig, Run

TOKENIZER = PixelConfig(image_size=8, patch=2, channels=3, std=0.5)
SMALL: dict[type, dict[str, Any]] = {
    MAEConfig: {"width": 32, "encoder_depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 2, "buffer": 3},
    DiffusionHeadConfig: {"width": 24, "depth": 2},
}
OPTIONS = SamplingOptions(steps=5, diffusion_steps=6, guidance=2.0)


def kinds(table: Any) -> tuple[type, ...]:
    """The config classes of a closed table: a union's members, or the only one."""
    return typing.get_args(table) or (table,)


def model_configs() -> list[ModelConfig]:
    """Every backbone x order x head that the tables hold, and both predictions of the diffusion head."""
    combinations = itertools.product(kinds(OrderConfig), kinds(BackboneConfig), kinds(HeadConfig))
    found = [
        ModelConfig(TOKENIZER.spec, 3, order(), backbone(**SMALL.get(backbone, {})), head(**SMALL.get(head, {})))
        for order, backbone, head in combinations
    ]
    return [
        *found,
        *(replace(c, head=replace(c.head, prediction="velocity")) for c in found if isinstance(c.head, DiffusionHeadConfig)),
    ]


def name(config: ModelConfig) -> str:
    return f"{config.backbone.kind}-{config.order.kind}-{config.head.kind}-{getattr(config.head, 'prediction', '')}"


def shaken(config: ModelConfig, seed: int = 0) -> Model:
    """A model in evaluation mode whose zero-initialised layers are not zero, so that nothing hides behind them."""
    torch.manual_seed(seed)
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def model_file(config: ModelConfig, options: SamplingOptions = OPTIONS) -> ModelFile:
    return ModelFile(config, TOKENIZER, ("ant", "bee", "cat"), options)


def tiny_run(path: Path | str, **loop: Any) -> Run:
    """A run of a few steps on images written by `write_images`."""
    defaults: dict[str, Any] = {"images": 48, "batch_size": 8, "log_images": 16, "sample_images": 0, "save_images": 16}
    return Run(
        data=DataConfig(path=str(path), flip=True),
        tokenizer=PixelConfig(image_size=8, patch=4),
        backbone=MAEConfig(width=16, encoder_depth=1, heads=2, decoder_depth=1, buffer=2),
        head=DiffusionHeadConfig(width=16, depth=1),
        optim=OptimConfig(lr=1e-3),
        ema=EMAConfig(decay=0.9),
        train=LoopConfig(**(defaults | loop)),
        sampling=SamplingOptions(steps=2, diffusion_steps=3, guidance=2.0),
    )


def write_images(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("ant", "bee"), size: int = 8) -> Path:
    """Class folders of noisy PNGs."""
    rng = np.random.default_rng(0)
    for label, folder in enumerate(classes):
        (root / folder).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 128, (size, size, 3)) + 120 * label
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / folder / f"{i}.png")
    return root
