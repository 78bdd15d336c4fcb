"""Tables with one row per token of a grid, at another grid: fine-tuning at another resolution (as ViT: Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.errors import require

Grid = tuple[int, int]


def resize_rows(rows_RE: Tensor, old: Grid, new: Grid, before: int = 0) -> Tensor:
    """Position embeddings of an old grid -> of a new one, by bicubic interpolation between the centres of tokens.

    When the grid shrinks the filter widens with it, so that no row is left out (antialiasing); beyond the border there is nothing,
    and weights are normalised to what is there: a constant stays a constant. The same grid gives the rows back as they are.

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
