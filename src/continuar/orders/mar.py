"""Masked autoregression: the next *set* of tokens, in a fresh random order per image (paper, Section 3.4).

After step s of S, floor(N cos(pi/2 (s+1)/S)) tokens stay unknown (MaskGIT's cosine schedule, Chang et al. 2022), at least one fewer
than before and at least one until the last step, which predicts all that is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from continuar.errors import require
from continuar.orders.random import RandomOrder

DEFAULT_STEPS = 64


@dataclass(frozen=True)
class MAROrderConfig:
    """Random order in groups that grow by a cosine; the paper's default."""

    kind: Literal["mar"] = "mar"
    max_group: ClassVar[int | None] = None
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = False

    def build(self, positions: int) -> MAROrder:
        """The order over ``positions`` tokens."""
        return MAROrder(positions)


class MAROrder(RandomOrder):
    """See the module's docstring. 64 steps unless said otherwise, or one per token where there are fewer."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        steps = min(DEFAULT_STEPS, self.positions) if steps is None else steps
        require(1 <= steps <= self.positions, f"steps is {steps}; allowed: 1 to {self.positions}, the number of tokens")
        steps = min(steps, unknown)
        sizes: list[int] = []
        left = unknown
        for s in range(steps):
            last = s == steps - 1
            # float64: in float32 the floor differs where 3 divides the number of steps.
            target = 0 if last else math.floor(unknown * math.cos(math.pi / 2 * (s + 1) / steps))
            after = 0 if last else max(1, min(left - 1, target))
            sizes.append(left - after)
            left = after
        return tuple(sizes)
