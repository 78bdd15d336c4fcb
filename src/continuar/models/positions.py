"""Positions on a grid of tokens: rotary embeddings, and learned tables at another grid.

Rotary positions (Su et al. 2021, arXiv 2104.09864; axial in two dimensions: Heo et al. 2024, 2403.13298):

1. A head's vector is D/2 pairs; half of them rotate with a position's row, half with its column. Pair i of an axis's P pairs
   rotates by ``BASE ** (-i / P)`` radians per token. A series, whose grid has one row, gives all pairs to its columns.
2. Queries and keys are rotated before their scores are taken: q at p times k at r depends only on p - r.
3. Slots that belong to no position (a condition) are not rotated.

Angles are computed from the positions where they are needed, so nothing has to be kept, saved or resized.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.errors import require

Grid = tuple[int, int]


Positions = Literal["learned", "rotary"]
BASE = 100.0
"""Usual for images, whose axes are short; 10,000 for text."""
NO_POSITION = -1
"""The index of a slot that belongs to no position."""


class Rotation(NamedTuple):
    """(cos, sin) of the angles by which queries and keys rotate, [2, B, 1, L, D/2] each."""

    query: Tensor
    key: Tensor


class Rotary:
    """Positions -> angles, for heads of ``head_dim`` dimensions, a multiple of 4. Stateless."""

    def __init__(self, grid: Grid, head_dim: int) -> None:
        self.grid, self.pairs = grid, head_dim // 2

    def __call__(self, index_BL: Tensor) -> Tensor:
        """Indices in raster order, or `NO_POSITION` -> (cos, sin) [2, B, 1, L, D/2] in float32."""
        columns = self.grid[1]
        axes = [index_BL % columns] if self.grid[0] == 1 else [index_BL // columns, index_BL % columns]
        each = self.pairs // len(axes)
        speed = BASE ** (torch.arange(each, device=index_BL.device, dtype=torch.float32) / -each)
        angle_BLP = torch.cat([axis[..., None] * speed for axis in axes], -1) * (index_BL != NO_POSITION)[..., None]
        return torch.stack((angle_BLP.cos(), angle_BLP.sin()))[:, :, None]


def apply_rotary(x_BHLD: Tensor, by: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D/2) of every head, in float32; the result has x's dtype."""
    a, b = x_BHLD.float().chunk(2, dim=-1)
    cos, sin = by
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BHLD.dtype)


def no_position(index_BK: Tensor, count: int) -> Tensor:
    """[B, count] of `NO_POSITION`."""
    return index_BK.new_full((len(index_BK), count), NO_POSITION)


def resize_rows(rows_RE: Tensor, old: Grid, new: Grid, before: int = 0) -> Tensor:
    """Position embeddings of an old grid -> of a new one, by bicubic interpolation between the centres of tokens.

    When the grid shrinks the filter widens with it, so that no row is left out (antialiasing). At the border weights are normalised
    to the rows that exist: a constant stays a constant. The same grid gives the rows back unchanged. For fine-tuning at another
    resolution (ViT: Dosovitskiy et al. 2021).

    Args:
        rows_RE: ``before`` rows that belong to no token and stay as they are, then one per token in raster order.
        old, new: (h, w); series are (1, N).

    Raises:
        UserError: a grid of images from a series or the other way round; another number of rows.
    """
    count = len(rows_RE) - before
    require(count == old[0] * old[1], f"{count} position embeddings; allowed: {old[0] * old[1]}, a grid of {old[0]} x {old[1]}")
    if old == new:
        return rows_RE
    series = [grid for grid in (old, new) if grid[0] == 1]
    require(
        len(series) != 1,
        f"position embeddings of {old[0]} x {old[1]} tokens have no meaning at {new[0]} x {new[1]}; allowed: "
        + (f"1 x N, another series (got {new[0]} rows)" if old[0] == 1 else "a grid of 2 or more rows"),
    )
    map_1Ehw = rows_RE[before:].float().T.reshape(1, -1, *old)
    resized = F.interpolate(map_1Ehw, new, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat((rows_RE[:before], resized.flatten(2)[0].T.to(rows_RE.dtype)))
