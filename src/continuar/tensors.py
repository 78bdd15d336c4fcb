"""Indexing [B, N, ...] tensors by [B, K] positions, shape checks, losses by time, and autocast guards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def batched_gather(x_BN: Tensor, index_BK: Tensor) -> Tensor:
    """[B, N, ...], [B, K] -> [B, K, ...]: each image's rows at its own positions. If x has batch 1, all images share it."""
    x_BN = x_BN.expand(index_BK.shape[0], *x_BN.shape[1:])
    return torch.gather(x_BN, 1, _expand_index(index_BK, x_BN))


def batched_scatter_(x_BN: Tensor, index_BK: Tensor, values_BK: Tensor) -> None:
    """Writes values [B, K, ...] into x [B, N, ...] in place, in x's dtype."""
    x_BN.scatter_(1, _expand_index(index_BK, x_BN), values_BK.to(x_BN.dtype))


def _expand_index(index_BK: Tensor, x_BN: Tensor) -> Tensor:
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


def check_rows(z: Tensor, target: Tensor, cond_dim: int, token_dim: int) -> None:
    """Raises ValueError unless z is [..., cond_dim] and target [..., token_dim], with equal leading dimensions."""
    if z.shape[-1] != cond_dim or target.shape != (*z.shape[:-1], token_dim):
        raise ValueError(f"z is {tuple(z.shape)} and x {tuple(target.shape)}; allowed: [M, {cond_dim}] and [M, {token_dim}]")


def add_loss_by_quarter(sums: Tensor | None, time: Tensor, loss: Tensor) -> None:
    """Adds losses at times in [0, 1), both of one shape, to ``sums`` [2, 4]: sums and counts by quarter of time.

    Runs on the device, without a host read. Nothing happens if ``sums`` is None.
    """
    if sums is not None:
        quarter = (4 * time).long().view(-1, 1) == torch.arange(4, device=time.device)
        loss = loss.detach().nan_to_num(0, 0, 0).view(-1, 1)
        sums += torch.stack((torch.where(quarter, loss, 0).sum(0), quarter.sum(0)))


META_AUTOCAST: ContextVar[bool] = ContextVar("META_AUTOCAST", default=False)
"""True while `training.estimate` counts memory on the meta device. That device has no autocast, so the estimate casts by itself and
reads here where it must not."""


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off for ``like``'s device: operations run in the dtype of their inputs."""
    return meta_autocast(False) if like.is_meta else torch.autocast(like.device.type, enabled=False)


@contextmanager
def meta_autocast(enabled: bool) -> Iterator[None]:
    """Sets `META_AUTOCAST` within the block."""
    before = META_AUTOCAST.set(enabled)
    try:
        yield
    finally:
        META_AUTOCAST.reset(before)


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Sets the precision of float32 matrix products within the block: "highest" (float32) or "high" (TF32 on GPUs that have it)."""
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
