"""Where autocast must not reach: timestep embeddings, posteriors and outputs run in the dtype of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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
