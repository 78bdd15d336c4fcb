"""Known tokens: checks of those that a user gives, and snapshots of a generation with its unknown tokens in grey."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from continuar.errors import UserError, require
from continuar.sampling.generate import SamplingInput
from continuar.tokenizers import TokenSpec

Array = Tensor | np.ndarray
GREY = 128


def with_known(inputs: SamplingInput, spec: TokenSpec, tokens: Array | None, mask: Array | None) -> SamplingInput:
    """The input with known tokens; images may differ in how many they know.

    Args:
        inputs: B images.
        spec: the model's tokens.
        tokens: [B, N, D] floats of about unit std, or ids [B, N]; a first dimension of 1 is used for all images. Values at unknown
            positions are ignored.
        mask: bool, True where known: [B, N], or [N] or [h, w] for all images.

    Raises:
        UserError: one without the other, or a shape, a type or a value that is not allowed.
    """
    if tokens is None or mask is None:
        missing = "known_mask" if mask is None else "known_tokens"
        raise UserError(f"{missing} is not given; allowed: known_tokens and known_mask together, or neither")
    device = inputs.known_BN.device
    known_BN = _checked_mask(mask, spec, len(inputs.known_BN)).to(device)
    values = _checked_tokens(tokens, spec, len(known_BN)).to(device)
    given = values[known_BN]
    ids = spec.kind == "id"
    wrong = given[(given < 0) | (given >= spec.vocabulary)] if ids else given[~given.isfinite()]
    if len(wrong):
        allowed = f"ids 0 to {spec.vocabulary - 1}" if ids else "finite values"
        raise UserError(f"known_tokens holds {wrong[0].item()} at a known position; allowed: {allowed}")
    unknown = ~known_BN if ids else ~known_BN.unsqueeze(-1)
    return replace(inputs, tokens=values.masked_fill(unknown, 0), known_BN=known_BN)


def _checked_mask(mask: Array, spec: TokenSpec, batch: int) -> Tensor:
    """bool [B, N]."""
    mask, (h, w), n = _tensor("known_mask", mask), spec.grid, spec.seq_len
    require(mask.dtype == torch.bool, f"known_mask is of {_dtype(mask)}; allowed: bool, True where a token is known")
    if mask.shape == (batch, n):
        return mask
    require(
        mask.shape in ((n,), (h, w)),
        f"known_mask is {list(mask.shape)}; allowed: [{batch}, {n}], or [{n}] or [{h}, {w}] for all images",
    )
    return mask.reshape(1, n).expand(batch, n)


def _checked_tokens(tokens: Array, spec: TokenSpec, batch: int) -> Tensor:
    """float32 [B, N, D] or int64 [B, N]."""
    tokens, one = _tensor("known_tokens", tokens), spec.blank(1, "meta")
    integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    fits, allowed = (integers, "integers, which are ids") if spec.kind == "id" else (tokens.is_floating_point(), "floats")
    require(fits, f"known_tokens is of {_dtype(tokens)}; allowed: {allowed}")
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


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Snapshot:
    """All images of a call after an autoregressive step.

    Attributes:
        tokens: [B, N, D] or ids [B, N]; zero where unknown. A copy: later steps do not change it.
        known_BN: bool.
        step: steps done, 1..steps; 0 of 0 if every token was known beforehand.
        steps: steps in all.
    """

    tokens: Tensor
    known_BN: Tensor
    step: int
    steps: int
    _decode: Callable[[Tensor], np.ndarray] = field(repr=False, compare=False)
    _grid: tuple[int, int] = field(repr=False, compare=False)

    def image(self) -> np.ndarray:
        """uint8 [B, H, W, 3], decoded at each call; the squares of unknown tokens are grey."""
        images_BHW3 = self._decode(self.tokens)
        (h, w), (height, width) = self._grid, images_BHW3.shape[1:3]
        unknown_Bhw = ~self.known_BN.unflatten(1, self._grid).cpu().numpy()
        unknown_BHW = unknown_Bhw.repeat(height // h, axis=1).repeat(width // w, axis=2)
        return np.where(unknown_BHW[..., None], np.uint8(GREY), images_BHW3)
