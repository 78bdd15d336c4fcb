"""A generation as it is watched: all images together, one snapshot after every step.

1. Batches of equal known count (see `known`) advance in lockstep, one step each; those that know more have fewer steps and wait.
2. After each step, tokens and masks are copied to their images' places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from continuar.generation.eager import Start
from continuar.generation.kinds import stream
from continuar.generation.known import Batch, equal_batches
from continuar.generation.plan import SamplingOptions, make_plan
from continuar.token_model import TokenModel

GREY = 128


@dataclass(frozen=True)
class Snapshot:
    """Some images after an autoregressive step.

    Attributes:
        tokens: [B, N, D] or ids [B, N]; zero where unknown. A copy: it stays as it is.
        known_BN: bool.
        step: steps done, 1..steps; 0 of 0 where everything was known from the start.
        steps: steps in all.
    """

    tokens: Tensor
    known_BN: Tensor
    step: int
    steps: int
    _decode: Callable[[Tensor], np.ndarray] = field(repr=False, compare=False)
    _grid: tuple[int, int] = field(repr=False, compare=False)

    def image(self) -> np.ndarray:
        """uint8 [B, H, W, 3]; the squares of unknown tokens are grey. Decoded here, at each call, and not before."""
        images_BHW3 = self._decode(self.tokens)
        return paint_unknown(images_BHW3, ~self.known_BN.unflatten(1, self._grid).cpu().numpy())


def paint_unknown(images_BHW3: np.ndarray, unknown_Bhw: np.ndarray) -> np.ndarray:
    """A copy of uint8 images in which the squares of unknown tokens are grey."""
    height, width = images_BHW3.shape[1] // unknown_Bhw.shape[1], images_BHW3.shape[2] // unknown_Bhw.shape[2]
    unknown_BHW = unknown_Bhw.repeat(height, axis=1).repeat(width, axis=2)
    return np.where(unknown_BHW[..., None], np.uint8(GREY), images_BHW3)


def snapshots(
    model: TokenModel, start: Start, options: SamplingOptions, batch_size: int, decode: Callable[[Tensor], np.ndarray]
) -> Iterator[Snapshot]:
    """Checks the settings at once, and generates as it is iterated over.

    Args:
        start: of all images; they may know different numbers of tokens.
        batch_size: images computed at once; the states of all are kept.
        decode: tokens -> uint8 [B, H, W, 3].

    Raises:
        UserError: a number of steps the order cannot take.
    """
    batches = equal_batches(start, batch_size)
    steps = max(len(make_plan(model.order, options, batch.unknown)) for batch in batches)
    return _run(model, start, batches, options, steps, decode)


def _run(
    model: TokenModel,
    start: Start,
    batches: Sequence[Batch],
    options: SamplingOptions,
    steps: int,
    decode: Callable[[Tensor], np.ndarray],
) -> Iterator[Snapshot]:
    grid = model.config.tokens.grid
    tokens, known_BN = model.config.tokens.blank(len(start.known_BN), start.known_BN.device), start.known_BN.clone()
    tokens[known_BN] = start.tokens[known_BN]
    engines = [(batch.rows_b, stream(model, batch.start, options)) for batch in batches]
    if steps == 0:
        yield Snapshot(tokens, known_BN, 0, 0, decode, grid)
    for step in range(1, steps + 1):
        for rows_b, engine in engines:
            progress = next(engine, None)
            if progress is not None:
                tokens[rows_b], known_BN[rows_b] = progress.tokens, progress.known_BN
        yield Snapshot(tokens.clone(), known_BN.clone(), step, steps, decode, grid)
