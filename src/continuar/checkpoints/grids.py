"""A model's weights at another grid of tokens: what was learned at 256 pixels, at 512."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from continuar.backbones.grids import Grid, resize_rows
from continuar.model import Model


def resized(state: Mapping[str, Tensor], old: Grid, model: Model) -> dict[str, Tensor]:
    """Weights of a model of grid ``old`` for ``model``: position embeddings are interpolated, all others stay as they are.

    Raises:
        UserError: there is no way from one grid to the other, or a table has another number of rows than its grid.
    """
    tables = {f"backbone.{name}": before for name, before in model.backbone.position_tables().items()}
    new = model.config.tokens.grid
    return {k: resize_rows(v, old, new, tables[k]) if k in tables else v for k, v in state.items()}


def at_grid(model: Model, grid: Grid) -> Model:
    """A model of the same weights for a grid of ``grid`` tokens, (h, w), on the same device.

    Raises:
        UserError: see `resized`.
    """
    config = replace(model.config, tokens=replace(model.config.tokens, grid=grid))
    other = config.build().to(next(model.parameters()).device).train(model.training)
    other.load_state_dict(resized(model.state_dict(), model.config.tokens.grid, other))
    return other
