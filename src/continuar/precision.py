"""Where autocast must not reach: timestep embeddings, posteriors and outputs run in the dtype of their inputs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off for ``like``'s device; the meta device, on which FLOPs are counted, has none."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)
