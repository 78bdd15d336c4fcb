"""The exponential moving average of a model's weights, kept as a second model in float32."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from continuar.token_model import TokenModel
from continuar.training.config import EMAConfig
from continuar.training.parallel import local


class EMA:
    """``model`` is the average: sample with it, save it.

    Args:
        source: the model that trains; both may be sharded after this and before the first update.
        config: decay and warm-up.
    """

    def __init__(self, source: TokenModel, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        self._source_model = source

    @cached_property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(average, source): this process's parts, which share the parameters' memory."""
        with torch.no_grad():
            return [local(p) for p in self.model.parameters()], [local(p) for p in self._source_model.parameters()]

    def decay(self, step: int) -> float:
        """The decay of the update after optimizer step ``step`` (0-based)."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay)(weights - average), in one multi-tensor call."""
        get_ema_multi_avg_fn(self.decay(step))(*self._pairs, step)
