"""Raster order: row by row, one token at a time (paper, Table 1, first row)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from continuar.orders.base import Order, known_first, one_by_one


@dataclass(frozen=True)
class RasterOrderConfig:
    """Row by row, one token at a time; for causal backbones."""

    kind: Literal["raster"] = "raster"
    max_group: ClassVar[int | None] = 1
    fixed: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False

    def build(self, positions: int) -> RasterOrder:
        """The order over ``positions`` tokens."""
        return RasterOrder(positions)


class RasterOrder(Order):
    """See the module's docstring. Known positions that are not a prefix come first all the same, and the rest in raster order."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        return one_by_one(steps, unknown, self.positions)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(self.training_order(len(known_BN), known_BN.device), known_BN)

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.arange(self.positions, device=device).expand(batch, -1)
