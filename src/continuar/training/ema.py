"""The exponential moving average of a model's weights, kept as a second model in float32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from continuar.model import Model
from continuar.training.config import EMAConfig


class EMA:
    """``model`` is the average: sample with it, save it.

    Args:
        source: the model that trains.
        config: decay and warm-up.
    """

    def __init__(self, source: Model, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        self._average: list[Tensor] = list(self.model.parameters())
        self._source: list[Tensor] = list(source.parameters())

    def decay(self, step: int) -> float:
        """The decay of the update after optimizer step ``step`` (0-based)."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay)(weights - average), in one multi-tensor call."""
        get_ema_multi_avg_fn(self.decay(step))(self._average, self._source, step)
