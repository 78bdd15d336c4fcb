"""Dropout and GELU of compiled training, in a form that torch.compile fuses into its neighbours.

**Dropout.** A mask is a hash of the element's number and a seed, computed where it is needed:

1. Once per block, two seeds s, t are drawn on the device from torch's default generator, so that a draw is a function of the
   generator's seed, also where a CUDA graph replays it. The elements of all dropouts of the block are numbered through.
2. Element i becomes h(i, s, t), a number of 32 bits: x = (i ^ s) A, then x = (x ^ (x >> 16) ^ t) B and x = (x ^ (x >> 15)) C, the
   finalizer of hash functions such as MurmurHash3. Every bit of i, s and t acts on the upper bits of h.
3. The element is kept, and divided by 1 - p, unless h is among the lowest 2^32 p (rounded) of all 32-bit numbers.

This takes some ten integer operations per element, where torch's Philox takes several times as many, and backward computes the mask
again instead of reading it from memory. Without a compiler it is slower than `torch.nn.functional.dropout`, which saves its mask.

**GELU** (Hendrycks & Gimpel 2016), value and derivative by one exponential: in a kernel that also hashes, the error function costs
more than the memory traffic (docs/results.md, "The speed of training"). x Phi(x) has the derivative Phi(x) + x phi(x), whose second
term is the derivative of -phi(x). With sg for a stopped gradient,
    x Phi(sg x) - (phi(x) - phi(sg x))
has the value and the derivative of both, and all of it comes from exp(-x^2/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Odd numbers whose bits look random, in two's complement.
_A, _B, _C = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def draw_seed(device: torch.device) -> Tensor:
    """s and t, int32 [2]."""
    # 31 bits each: bounds that do not fit int32 are not safe in compiled code.
    return torch.randint(2**31 - 1, (2,), dtype=torch.int32, device=device)


def block_seed(x_BLE: Tensor, p: float) -> Tensor | None:
    """The seed of a block's three dropouts, or None if there is nothing to drop or too many elements to number."""
    # One width after attention, four inside the MLP and one behind it.
    return draw_seed(x_BLE.device) if p > 0 and 6 * x_BLE.numel() < 2**31 else None


def hashed_mlp(mlp: nn.Sequential, p: float, x: Tensor, seed_2: Tensor) -> Tensor:
    """Linear, GELU, dropout, Linear, dropout. The elements are numbered behind those of attention's dropout, as many as x has."""
    up, _, _, down, _ = mlp
    count = x.numel()
    return hashed_dropout(down(hashed_gelu_dropout(up(x), p, seed_2, 2 * count)), p, seed_2, count)


def kept(shape: torch.Size, p: float, seed_2: Tensor, first: int) -> Tensor:
    """The dropout mask of a tensor of this shape: bool, True with probability 1 - p.

    Args:
        p: 0 up to below 1.
        seed_2: from `draw_seed`.
        first: the number of the first element; that of the last is below 2^31.
    """
    s, t = seed_2.unbind()
    i = torch.arange(first, first + shape.numel(), dtype=torch.int32, device=seed_2.device)
    # A shift of a signed number copies its sign; with the mask it is that of an unsigned one.
    x = (i ^ s) * _A
    x = (x ^ ((x >> 16) & 0xFFFF) ^ t) * _B
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _C
    return (x >= round(p * 2**32) - 2**31).view(shape)


def hashed_dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    """The elements of x that `kept` keeps, divided by 1 - p, and zeros elsewhere; backward computes the mask again."""
    return _recomputed(_dropout, x, p, seed_2, first)


def hashed_gelu_dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    """`hashed_dropout` of GELU(x); backward computes the GELU again, too."""
    return _recomputed(_gelu_dropout, x, p, seed_2, first)


def _dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    return x * (1 / (1 - p)) * kept(x.shape, p, seed_2, first)


def _gelu_dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    return _dropout(gelu(x), p, seed_2, first)


def _recomputed(
    function: Callable[[Tensor, float, Tensor, int], Tensor], x: Tensor, p: float, seed_2: Tensor, first: int
) -> Tensor:
    # `checkpoint` tells the compiler what to compute again in backward; without it, it saves some masks and results. It would also
    # save element numbers that two dropouts have in common, hence their different ``first``.
    return checkpoint(function, x, p, seed_2, first, use_reentrant=False, preserve_rng_state=False)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) of any shape, in the type of x."""
    # Not an autograd.Function: torch 2.11 computes wrong gradients for those inside a checkpoint.
    exact = x.float()
    bell = torch.exp2(exact * exact * (-0.5 / math.log(2)))
    fixed = bell.detach()
    return (exact * _cumulative(exact.detach(), fixed) - (bell - fixed) * (1 / math.sqrt(2 * math.pi))).to(x.dtype)


def _cumulative(x: Tensor, bell: Tensor) -> Tensor:
    """Phi of the standard normal at x, given exp(-x^2/2), in float32: Abramowitz & Stegun 7.1.26, at most 1e-7 off."""
    d = 1 + 0.3275911 / math.sqrt(2) * x.abs()
    t = torch.rsqrt(d * d)  # 1/d, without a division
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * polynomial * bell
    return torch.where(x < 0, tail, 1 - tail)
