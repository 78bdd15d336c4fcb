"""How many tokens training hides from a bidirectional backbone (paper, Section 4).

One mask ratio per step from a normal of mean 1 and std 0.25, truncated to [minimum, 1]; ceil(N ratio) tokens are unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

import torch

_RATIO = NormalDist(1.0, 0.25)


class MaskCount:
    """Draws the number of hidden tokens.

    Args:
        positions: N.
        minimum: the lower end of the ratio, 0..1.
        granularity: the count is rounded to the nearest multiple of this.
    """

    def __init__(self, positions: int, minimum: float, granularity: int) -> None:
        self.positions, self.minimum, self.granularity = positions, minimum, granularity

    def draw(self) -> int:
        """A count 1..N, from torch's default generator of the CPU: it decides shapes, so it is a host integer."""
        return self._count(torch.rand((), dtype=torch.float64).item())

    def distribution(self) -> dict[int, float]:
        """Every count that `draw` can give, with its probability."""
        grid = 4096
        drawn = Counter(self._count((i + 0.5) / grid) for i in range(grid))
        return {count: times / grid for count, times in sorted(drawn.items())}

    def _count(self, uniform: float) -> int:
        """ceil(N ratio), rounded to the granularity."""
        masked, grain = math.ceil(self.positions * self.ratio(uniform)), self.granularity
        return min(self.positions, max(grain, (masked + grain // 2) // grain * grain))

    def ratio(self, uniform: float) -> float:
        """The truncated normal's quantile function at ``uniform`` in [0, 1)."""
        low = _RATIO.cdf(self.minimum)
        value = _RATIO.inv_cdf(min(low + uniform * (0.5 - low), 0.5))
        return min(1.0, max(self.minimum, value))
