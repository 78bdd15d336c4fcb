"""Rotary position embeddings on a grid (Su et al. 2021, arXiv 2104.09864; axial in two dimensions: Heo et al. 2024, 2403.13298).

1. A head's vector is D/2 pairs; half of them turn with the row of a position, half with its column. Pair i of an axis's P pairs
   turns by ``BASE ** (-i / P)`` radians per token. A series, whose grid has one row, gives all pairs to its columns.
2. Queries and keys are turned before their scores are taken: q turned by p, times k turned by r, depends on p - r alone.
3. Slots that belong to no position (a condition) are not turned.

Angles are computed from the positions where they are needed: there is nothing to keep, to save or to resize.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from continuar.backbones.grids import Grid
from continuar.errors import require

Positions = Literal["learned", "rotary"]
BASE = 100.0
"""As for images, whose axes are short; 10,000 is usual for text."""
NOWHERE = -1
"""The index of a slot that belongs to no position."""


class Rotation(NamedTuple):
    """(cos, sin) by which queries and keys turn, [2, B, 1, L, D/2] each."""

    query: Tensor
    key: Tensor


class Rotary:
    """Positions -> angles, for heads of ``head_dim`` dimensions, a multiple of 4. Stateless."""

    def __init__(self, grid: Grid, head_dim: int) -> None:
        self.grid, self.pairs = grid, head_dim // 2

    def __call__(self, index_BL: Tensor) -> Tensor:
        """Indices in raster order, or `NOWHERE` -> (cos, sin) [2, B, 1, L, D/2] in float32."""
        columns = self.grid[1]
        axes = [index_BL % columns] if self.grid[0] == 1 else [index_BL // columns, index_BL % columns]
        each = self.pairs // len(axes)
        speed = BASE ** (torch.arange(each, device=index_BL.device, dtype=torch.float32) / -each)
        angle_BLP = torch.cat([axis[..., None] * speed for axis in axes], -1) * (index_BL != NOWHERE)[..., None]
        return torch.stack((angle_BLP.cos(), angle_BLP.sin()))[:, :, None]


def turn(x_BHLD: Tensor, by: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of every head, in float32; the result has x's dtype."""
    a, b = x_BHLD.float().chunk(2, dim=-1)
    cos, sin = by
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BHLD.dtype)


def nowhere(index_BK: Tensor, count: int) -> Tensor:
    """[B, count] of `NOWHERE`."""
    return index_BK.new_full((len(index_BK), count), NOWHERE)


def check_rotary(positions: str, parts: dict[str, tuple[int, int]]) -> None:
    """Refuses heads that rotary positions cannot turn.

    Args:
        parts: (width, heads) by name.
    """
    require(positions in ("learned", "rotary"), f"backbone.positions is '{positions}'; allowed: learned, rotary")
    for name, (width, heads) in parts.items():
        fits = positions == "learned" or width // heads % 4 == 0
        require(fits, f"{name} of {width // heads} dimensions with rotary positions; allowed: multiples of 4, two axes of pairs")
