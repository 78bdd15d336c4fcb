"""FLOPs of a model, counted on the meta device: nothing is computed or allocated. A multiply-add is two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from continuar.backbones.blocks import Block
from continuar.baselines import DiT, DiTConfig
from continuar.generation.plan import SamplingOptions, make_plan
from continuar.guidance import Guidance
from continuar.heads import DiffusionOptions
from continuar.model import Model, ModelConfig
from continuar.noise import KeyedNoise
from continuar.orders import View
from continuar.training.memory import COUNTED


def training_flops(config: ModelConfig | DiTConfig, recompute: bool = False) -> float:
    """Per image and step: forward and backward (twice the forward) at the mean number of masked tokens.

    Args:
        recompute: blocks go forward once more (`LoopConfig.recompute`).
    """
    with torch.device("meta"):
        model = config.build()
        spec = config.tokens
        queried = min(spec.positions, round(model.mean_queried()))
        view = View(torch.zeros(COUNTED, spec.positions, dtype=torch.int64), spec.positions - queried)
        again = 0
        with FlopCounterMode(display=False) as counter:

            def enter(block: nn.Module, given: Any) -> None:
                nonlocal again
                again -= counter.get_total_flops()

            def leave(block: nn.Module, given: Any, out: Any) -> None:
                nonlocal again
                again += counter.get_total_flops()

            for block in (m for m in model.modules() if isinstance(m, Block) and recompute):
                block.register_forward_pre_hook(enter)
                block.register_forward_hook(leave)
            model.loss(spec.blank(COUNTED), None, view)
    return (3.0 * counter.get_total_flops() + again) / COUNTED


def generation_flops(config: ModelConfig | DiTConfig, options: SamplingOptions) -> float:
    """Per image: the backbone at every step and the head for every token, both halves of each if guided; or all of a DiT as often
    as it denoises."""
    with torch.device("meta"):
        model = config.build().eval()
        if isinstance(model, DiT):
            return _dit_flops(model, options)
        plan = make_plan(model.order, options, config.tokens.positions)
        # Attention makes a backbone step at most quadratic in the number of known tokens: three points determine it.
        points = [0, config.tokens.positions // 2, config.tokens.positions - 1]
        curve = np.polyfit(points, [_backbone_flops(model, known) for known in points], 2)
        backbone = sum(float(np.polyval(curve, step.start)) for step in plan)
        guided = options.guidance != 1.0
        head = _head_flops(model, options.for_head(config), guided)
        return backbone * (2 if guided else 1) + head * config.tokens.positions


def _dit_flops(model: DiT, options: SamplingOptions) -> float:
    """Denoising one image."""
    options, zero = options.for_head(model.config), torch.zeros(1, dtype=torch.int64)
    assert isinstance(options.head, DiffusionOptions)
    with FlopCounterMode(display=False) as counter:
        model(model.config.tokens.blank(1), zero, zero)
    return float(counter.get_total_flops()) * options.head.diffusion_steps * (2 if options.guidance != 1.0 else 1)


def _backbone_flops(model: Model, known: int) -> int:
    """One evaluation for one image with ``known`` known tokens."""
    spec = model.config.tokens
    index = torch.zeros(1, spec.positions, dtype=torch.int64)
    state = model.backbone.start(model.condition.null(1), spec.positions)
    if known:
        model.backbone.commit(state, index[:, :known], torch.zeros(1, known, model.backbone.width))
    with FlopCounterMode(display=False) as counter:
        model.backbone.predict(state, index[:, :1])
    return counter.get_total_flops()


def _head_flops(model: Model, options: SamplingOptions, guided: bool) -> int:
    """Drawing one token."""
    z, row = torch.zeros(1, model.backbone.z_dim), torch.zeros(1, dtype=torch.int64)
    scalar = torch.tensor(1.0)
    with FlopCounterMode(display=False) as counter:
        model.head.draw(
            z,
            options=options.head,
            temperature=scalar,
            noise=KeyedNoise(row, row),
            guidance=Guidance(z, scalar) if guided else None,
        )
    return counter.get_total_flops()
