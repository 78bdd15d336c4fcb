"""Random order, one token at a time, a fresh permutation per image (paper, Table 1, second and third row)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from continuar.noise import keyed_permutation
from continuar.orders.base import Order, known_first, one_by_one


@dataclass(frozen=True)
class RandomOrderConfig:
    """A fresh permutation per image, one token at a time."""

    kind: Literal["random"] = "random"
    max_group: ClassVar[int | None] = 1
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = False

    def build(self, positions: int) -> RandomOrder:
        """The order over ``positions`` tokens."""
        return RandomOrder(positions)


class RandomOrder(Order):
    """See the module's docstring."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        return one_by_one(steps, unknown, self.positions)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(keyed_permutation(seeds_B, self.positions), known_BN)

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.rand(batch, self.positions, device=device).argsort(dim=1)
