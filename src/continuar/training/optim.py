"""AdamW with the paper's parameter groups, and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch

from continuar.token_model import TokenModel
from continuar.training.config import OptimConfig


def build_optimizer(model: TokenModel, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and the head. Fused: it can skip a step on the device, without a host read."""
    decayed, others = model.parameter_groups()
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimConfig, images: int, total_images: int) -> float:
    """The rate for the step that begins after ``images`` images of a run of ``total_images``."""
    if images < config.warmup_images:
        return config.lr * images / config.warmup_images
    if config.decay == "constant":
        return config.lr
    start = config.warmup_images
    if config.decay == "linear" and config.decay_images:
        start = max(start, total_images - config.decay_images)
    progress = min(1.0, max(0.0, (images - start) / max(1, total_images - start)))
    falling = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)
