"""Tiny models for tests: every combination of the closed tables, at sizes that run in milliseconds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from continuar.checkpoints.store import PipelineConfig
from continuar.config import members
from continuar.errors import UserError
from continuar.heads import (
    DiffusionHeadConfig,
    DiffusionOptions,
    FlowHeadConfig,
    HeadConfig,
    MixtureHeadConfig,
    RegressionHeadConfig,
    option_names,
)
from continuar.models import BackboneConfig, CausalConfig, MAEConfig
from continuar.models.autoregressive import Model, ModelConfig
from continuar.models.compatibility import check_parts
from continuar.orders import OrderConfig
from continuar.pipeline import Pipeline
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import CodebookConfig, CodebookTokenizer, PixelConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig, Run

TOKENIZER = PixelConfig(image_size=8, patch=2, channels=3, std=0.5)
IDS = CodebookConfig(image_size=8, patch=2, channels=3, vocabulary=11)
SMALL: dict[type, dict[str, Any]] = {
    CausalConfig: {"width": 32, "depth": 2, "heads": 2},
    FlowHeadConfig: {"width": 24, "depth": 2},
    RegressionHeadConfig: {"width": 24, "depth": 2},
    MixtureHeadConfig: {"components": 3},
    MAEConfig: {"width": 32, "encoder_depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 2, "buffer": 3},
    DiffusionHeadConfig: {"width": 24, "depth": 2},
}


def takes_steps(config: ModelConfig) -> bool:
    """Whether the order lets one choose the number of steps."""
    try:
        config.order.build(16).group_sizes(5, 16)
    except UserError:
        return False
    return True


def options_of(config: ModelConfig, **values: Any) -> SamplingOptions:
    """Few steps, of every kind that the model has, and guidance; ``values`` replace them."""
    small = {"diffusion_steps": 6, "flow_steps": 6, "candidates": 8}
    defaults = SamplingOptions().for_head(config.head)
    names = option_names(type(config.head.options()))
    steps = {"steps": 5} if takes_steps(config) else {}
    return defaults.override(**(steps | {"guidance_scale": 2.0} | {k: v for k, v in small.items() if k in names} | values))


def tokenizer_of(config: ModelConfig) -> PixelConfig | CodebookConfig:
    """The tokenizer whose tokens the model takes."""
    return IDS if config.tokens.kind == "id" else TOKENIZER


def model_configs() -> list[ModelConfig]:
    """Every backbone x order x head of the tables that can work together, both predictions of the diffusion head, and rotary
    positions with every backbone and order; heads know nothing of them, so one head is enough."""
    found = []
    for order, backbone, head in itertools.product(members(OrderConfig), members(BackboneConfig), members(HeadConfig)):
        tokens = (IDS if head.token_kind == "id" else TOKENIZER).spec
        try:
            check_parts(tokens, order, backbone, head)
        except UserError:
            continue
        found.append(ModelConfig(tokens, 3, order(), backbone(**SMALL.get(backbone, {})), head(**SMALL.get(head, {}))))
    velocity = [
        replace(c, head=replace(c.head, prediction="v_prediction")) for c in found if isinstance(c.head, DiffusionHeadConfig)
    ]
    rotary = [replace(c, backbone=replace(c.backbone, positions="rotary")) for c in found if c.head.kind in ("flow", "categorical")]
    rotary = [c for c in rotary if c.head.kind == "flow" or c.order.needs_log_prob]
    return [*found, *velocity, *rotary]


def random_tokens(config: ModelConfig, batch: int, seed: int) -> Tensor:
    """Tokens of the model's kind: standard normal vectors, or uniform ids."""
    generator = torch.Generator().manual_seed(seed)
    spec = config.tokens
    if spec.kind == "id":
        return torch.randint(spec.vocabulary, (batch, spec.seq_len), generator=generator)
    return torch.randn(batch, spec.seq_len, spec.dim, generator=generator)


def name(config: ModelConfig) -> str:
    prediction = getattr(config.head, "prediction", "")
    positions = getattr(config.backbone, "positions", "learned")
    extras = [word for word in (prediction, "" if positions == "learned" else positions) if word]
    return "-".join([config.backbone.kind, config.order.kind, config.head.kind, *extras])


def shaken(config: ModelConfig, seed: int = 0) -> Model:
    """A model in evaluation mode whose zero-initialised layers are not zero, so that nothing hides behind them."""
    torch.manual_seed(seed)
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def model_file(config: ModelConfig, options: SamplingOptions | None = None) -> PipelineConfig:
    return PipelineConfig(config, tokenizer_of(config), ("ant", "bee", "cat"), options or options_of(config))


def pipeline(config: ModelConfig, model: Model | None = None, options: SamplingOptions | None = None) -> Pipeline:
    """A pipeline of a shaken model, with a random codebook where ids need one."""
    tokenizer = tokenizer_of(config).build()
    if isinstance(tokenizer, CodebookTokenizer):
        tokenizer.codebook.copy_(torch.rand(tokenizer.codebook.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    return Pipeline(model_file(config, options), model or shaken(config), tokenizer)


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
        sampling=SamplingOptions(steps=2, guidance_scale=2.0, head=DiffusionOptions(diffusion_steps=3)),
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
