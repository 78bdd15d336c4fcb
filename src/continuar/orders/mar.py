"""Masked autoregression: the next *set* of tokens, in a fresh random order per image (paper, Section 3.4).

1. Training: one mask ratio per step from a truncated normal; ceil(N ratio) positions of a random permutation are unknown.
2. Generation: after step s of S, floor(N cos(pi/2 (s+1)/S)) stay unknown (MaskGIT's cosine schedule, Chang et al. 2022), at least
   one fewer than before and at least one until the last step, which predicts all that is left.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from continuar.errors import require
from continuar.noise import keyed_permutation
from continuar.orders.base import Order, View, known_first

# Of the masked share, before truncation (paper, Section 4).
_RATIO = NormalDist(1.0, 0.25)


@dataclass(frozen=True)
class MAROrderConfig:
    """Random order in groups that grow by a cosine; the paper's default."""

    kind: Literal["mar"] = "mar"
    mask_ratio_min: float = 0.7
    """Lower end of the truncated normal (mean 1, std 0.25, upper end 1) that the masked share is drawn from; 0..1."""
    mask_granularity: int = 1
    """The masked count is rounded to the nearest multiple of this, so that few shapes occur and compilation pays."""

    def __post_init__(self) -> None:
        require(0 <= self.mask_ratio_min <= 1, f"mask_ratio_min is {self.mask_ratio_min}; allowed: 0 to 1")
        require(self.mask_granularity >= 1, f"mask_granularity is {self.mask_granularity}; allowed: 1 or more")

    def build(self, positions: int) -> MAROrder:
        """The order over ``positions`` tokens."""
        return MAROrder(positions, self.mask_ratio_min, self.mask_granularity)


class MAROrder(Order):
    """See the module's docstring."""

    def __init__(self, positions: int, mask_ratio_min: float = 0.7, mask_granularity: int = 1) -> None:
        super().__init__(positions)
        self.mask_ratio_min, self.mask_granularity = mask_ratio_min, mask_granularity

    def group_sizes(self, steps: int, unknown: int) -> tuple[int, ...]:
        require(steps >= 1, f"steps is {steps}; allowed: 1 to {unknown}")
        sizes: list[int] = []
        left = unknown
        for s in range(min(steps, unknown)):
            last = s == min(steps, unknown) - 1
            # float64: in float32 the floor differs where 3 divides the number of steps.
            target = 0 if last else math.floor(unknown * math.cos(math.pi / 2 * (s + 1) / min(steps, unknown)))
            after = 0 if last else max(1, min(left - 1, target))
            sizes.append(left - after)
            left = after
        return tuple(sizes)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(keyed_permutation(seeds_B, self.positions), known_BN)

    def training_view(self, batch: int, device: torch.device) -> View:
        masked = self._masked(torch.rand((), dtype=torch.float64).item())
        order = torch.rand(batch, self.positions, device=device).argsort(dim=1)
        return View(order, self.positions - masked)

    def masked_counts(self) -> dict[int, float]:
        grid = 4096
        drawn = Counter(self._masked((i + 0.5) / grid) for i in range(grid))
        return {count: times / grid for count, times in sorted(drawn.items())}

    def _masked(self, uniform: float) -> int:
        """ceil(N ratio), rounded to the granularity."""
        masked = math.ceil(self.positions * self._mask_ratio(uniform))
        grain = self.mask_granularity
        return min(self.positions, max(grain, (masked + grain // 2) // grain * grain))

    def _mask_ratio(self, uniform: float) -> float:
        """The truncated normal's quantile function at ``uniform`` in [0, 1)."""
        low = _RATIO.cdf(self.mask_ratio_min)
        value = _RATIO.inv_cdf(min(low + uniform * (0.5 - low), 0.5))
        return min(1.0, max(self.mask_ratio_min, value))
