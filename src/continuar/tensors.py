"""Rows of each image at its own positions: reading and writing [B, N, ...] tensors by [B, K] indices.

Where autocast must not reach: timestep embeddings, posteriors and outputs run in the dtype of their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def batched_gather(x_BN: Tensor, index_BK: Tensor) -> Tensor:
    """[B, N, ...], [B, K] -> [B, K, ...]. A batch of one in x is shared by all."""
    x_BN = x_BN.expand(index_BK.shape[0], *x_BN.shape[1:])
    return torch.gather(x_BN, 1, _like(index_BK, x_BN))


def batched_scatter_(x_BN: Tensor, index_BK: Tensor, values_BK: Tensor) -> None:
    """Writes values [B, K, ...] into x [B, N, ...] in place, in x's dtype."""
    x_BN.scatter_(1, _like(index_BK, x_BN), values_BK.to(x_BN.dtype))


def _like(index_BK: Tensor, x_BN: Tensor) -> Tensor:
    """The index, repeated over the trailing dimensions of x."""
    return index_BK.view(*index_BK.shape, *(1 for _ in x_BN.shape[2:])).expand(*index_BK.shape, *x_BN.shape[2:])


@torch.no_grad()
def lerp_unless_(targets: list[Tensor], sources: list[Tensor], weight: float, skip: Tensor | None = None) -> None:
    """target += weight (source - target) for all pairs, in place and in a few launches, unless ``skip``, a 0-d bool tensor."""
    if not targets:
        return
    # This is a step of SGD with gradient -source and weight decay 1, whose fused kernel skips by a flag on the device. A lerp
    # cannot.
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        targets,
        sources,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=None if skip is None else skip.float(),
    )


META_AUTOCAST: ContextVar[bool] = ContextVar("META_AUTOCAST", default=False)
"""The meta device, on which costs are counted, has no autocast; this is the switch of those who count as if it had."""


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off for ``like``'s device."""
    return meta_autocast(False) if like.is_meta else torch.autocast(like.device.type, enabled=False)


@contextmanager
def meta_autocast(enabled: bool) -> Iterator[None]:
    """Within the block `META_AUTOCAST` is ``enabled``."""
    before = META_AUTOCAST.set(enabled)
    try:
        yield
    finally:
        META_AUTOCAST.reset(before)


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Within the block, float32 matrix products are "highest" (float32) or "high" (TF32, on GPUs that have it)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, float32 products and convolutions are computed in float32, without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with matmul_precision("highest"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
