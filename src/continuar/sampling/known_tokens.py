"""Known tokens: what a generation is given beforehand, and batches that the engine can run.

1. `with_known` checks tokens and their mask and puts them into a `SamplingInput` of all images.
2. `equal_batches` groups its rows by how many tokens they know: within a batch of the engine that count is the same, so that every
   tensor is rectangular. Noise belongs to an image and its positions, so an image does not depend on this grouping.

A generation as it is watched: all images together, one snapshot after every step.

1. Batches of equal known count (see `known`) advance in lockstep, one step each; those that know more have fewer steps and wait.
2. After each step, tokens and masks are copied to their images' places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from continuar.errors import UserError, require
from continuar.sampling.engines import Engine
from continuar.sampling.generate import SamplingInput, SamplingOptions, make_plan
from continuar.tokenizers import TokenSpec

Array = Tensor | np.ndarray


def with_known(start: SamplingInput, spec: TokenSpec, tokens: Array | None, mask: Array | None) -> SamplingInput:
    """A start whose images know some of their tokens, not necessarily equally many.

    Args:
        start: of B images.
        spec: the model's tokens.
        tokens: [B, N, D] floats of about unit std, or ids [B, N]; a first dimension of 1 serves all images. What stands at unknown
            positions does not matter. None: nothing is known.
        mask: bool, True where known: [B, N], or [N] or [h, w] for all images.

    Raises:
        UserError: one without the other, or a shape, a type or a value that is not allowed.
    """
    if tokens is None or mask is None:
        lacking = "known_mask" if mask is None else "known_tokens"
        require(tokens is mask, f"{lacking} is not given; allowed: known_tokens and known_mask together, or neither")
        return start
    known_BN = _mask_of(mask, spec, len(start.known_BN)).to(start.known_BN.device)
    values = _tokens_of(tokens, spec, len(known_BN)).to(known_BN.device)
    given = values[known_BN]
    ids = spec.kind == "id"
    wrong = given[(given < 0) | (given >= spec.vocabulary)] if ids else given[~given.isfinite()]
    if len(wrong):
        allowed = f"ids 0 to {spec.vocabulary - 1}" if ids else "finite values"
        raise UserError(f"known_tokens holds {wrong[0].item()} at a known position; allowed: {allowed}")
    return replace(start, tokens=values, known_BN=known_BN)


def _mask_of(mask: Array, spec: TokenSpec, batch: int) -> Tensor:
    """bool [B, N]."""
    mask, (h, w), n = _tensor("known_mask", mask), spec.grid, spec.seq_len
    require(mask.dtype == torch.bool, f"known_mask is of {_name(mask)}; allowed: bool, True where a token is known")
    if mask.shape == (batch, n):
        return mask
    require(
        mask.shape in ((n,), (h, w)),
        f"known_mask is {list(mask.shape)}; allowed: [{batch}, {n}], or [{n}] or [{h}, {w}] for all images",
    )
    return mask.reshape(1, n).expand(batch, n)


def _tokens_of(tokens: Array, spec: TokenSpec, batch: int) -> Tensor:
    """float32 [B, N, D] or int64 [B, N]."""
    tokens, one = _tensor("known_tokens", tokens), spec.blank(1, "meta")
    integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    fits, allowed = (integers, "integers, which are ids") if spec.kind == "id" else (tokens.is_floating_point(), "floats")
    require(fits, f"known_tokens is of {_name(tokens)}; allowed: {allowed}")
    shape = list(one.shape[1:])
    require(
        tokens.ndim == one.ndim and list(tokens.shape[1:]) == shape and len(tokens) in (1, batch),
        f"known_tokens is {list(tokens.shape)}; allowed: {[batch, *shape]}, or {[1, *shape]} for all images",
    )
    return tokens.detach().to(one.dtype).expand(batch, *shape)


def _tensor(name: str, value: Array) -> Tensor:
    try:
        # A copy: arrays that come from pictures are often read-only, which a tensor cannot be.
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise UserError(f"{name} is a {type(value).__name__}; allowed: a tensor or a NumPy array of numbers") from problem


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Batch:
    """Images that are generated together.

    Attributes:
        rows_b: int64, which of all images they are.
        start: of these images.
        unknown: how many tokens each of them lacks.
    """

    rows_b: Tensor
    start: SamplingInput
    unknown: int


def equal_batches(start: SamplingInput, size: int) -> tuple[Batch, ...]:
    """Cuts a start into batches of at most ``size`` images, which all know the same number of tokens; fewest unknown last."""
    unknown = (~start.known_BN).sum(1).tolist()
    batches = []
    for count in sorted(set(unknown), reverse=True):
        rows = [row for row, lacking in enumerate(unknown) if lacking == count]
        for first in range(0, len(rows), size):
            index = torch.tensor(rows[first : first + size], device=start.known_BN.device)
            batches.append(Batch(index, _rows(start, index), count))
    return tuple(batches)


def _rows(start: SamplingInput, index_b: Tensor) -> SamplingInput:
    values: dict[str, Any] = {f.name: getattr(start, f.name) for f in fields(start)}
    return replace(start, **{name: value[index_b] for name, value in values.items() if value is not None})


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
    engine: Engine, start: SamplingInput, options: SamplingOptions, batch_size: int, decode: Callable[[Tensor], np.ndarray]
) -> Iterator[Snapshot]:
    """Checks the settings at once, and generates as it is iterated over.

    Args:
        engine: who generates; of several batches at a time.
        start: of all images; they may know different numbers of tokens.
        batch_size: images computed at once; the states of all are kept.
        decode: tokens -> uint8 [B, H, W, 3].

    Raises:
        UserError: a number of steps the order cannot take.
    """
    batches = equal_batches(start, batch_size)
    steps = max(len(make_plan(engine.model.order, options, batch.unknown)) for batch in batches)
    return _run(engine, start, batches, options, steps, decode)


def _run(
    engine: Engine,
    start: SamplingInput,
    batches: Sequence[Batch],
    options: SamplingOptions,
    steps: int,
    decode: Callable[[Tensor], np.ndarray],
) -> Iterator[Snapshot]:
    spec = engine.model.config.tokens
    tokens, known_BN = spec.blank(len(start.known_BN), start.known_BN.device), start.known_BN.clone()
    tokens[known_BN] = start.tokens[known_BN]
    streams = [(batch.rows_b, engine.stream(batch.start, options)) for batch in batches]
    if steps == 0:
        yield Snapshot(tokens, known_BN, 0, 0, decode, spec.grid)
    for step in range(1, steps + 1):
        for rows_b, stream in streams:
            progress = next(stream, None)
            if progress is not None:
                tokens[rows_b], known_BN[rows_b] = progress.tokens, progress.known_BN
        yield Snapshot(tokens.clone(), known_BN.clone(), step, steps, decode, spec.grid)
