"""Rows of each image at its own positions: reading and writing [B, N, ...] tensors by [B, K] indices."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x_BN: Tensor, index_BK: Tensor) -> Tensor:
    """[B, N, ...], [B, K] -> [B, K, ...]. A batch of one in x is shared by all."""
    x_BN = x_BN.expand(index_BK.shape[0], *x_BN.shape[1:])
    return torch.gather(x_BN, 1, _like(index_BK, x_BN))


def put_(x_BN: Tensor, index_BK: Tensor, values_BK: Tensor) -> None:
    """Writes values [B, K, ...] into x [B, N, ...] in place, in x's dtype."""
    x_BN.scatter_(1, _like(index_BK, x_BN), values_BK.to(x_BN.dtype))


def _like(index_BK: Tensor, x_BN: Tensor) -> Tensor:
    """The index, repeated over the trailing dimensions of x."""
    return index_BK.view(*index_BK.shape, *(1 for _ in x_BN.shape[2:])).expand(*index_BK.shape, *x_BN.shape[2:])
