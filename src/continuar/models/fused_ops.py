"""Dropout for compiled code: what is kept is a hash of the element's number and a seed, computed where it is needed.

1. Once per block, two seeds s, t are drawn on the device from torch's default generator, so that a draw is a function of
   the generator's seed, also where a CUDA graph replays it. The elements of all dropouts of the block are numbered through.
2. Element i becomes h(i, s, t), a number of 32 bits: x = (i ^ s) A, then x = (x ^ (x >> 16) ^ t) B and x = (x ^ (x >> 15)) C, the
   steps of what finishes hash functions such as MurmurHash3. Every bit of i, s and t acts on the upper bits of h.
3. It is kept, and divided by 1 - p, where h is not among the lowest 2^32 p (rounded) of all 32-bit numbers.

A compiler fuses this into what is around it, at some ten integer operations per element where torch's own Philox takes several
times as many; and a mask is nothing to save for backward, because it can be computed again from the seeds. It is for torch.compile:
operation by operation it would be slower than `torch.nn.functional.dropout`, which saves its mask.

GELU for compiled code (Hendrycks & Gimpel 2016), value and derivative by one exponential.

Kernels that hold a GELU and a dropout's hash wait for arithmetic, not for memory, and of all that an error function is the most
(docs/results.md, "The speed of training").

x Phi(x) has the derivative Phi(x) + x phi(x), whose second term is the derivative of -phi(x). With sg for "held fixed",
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


class Dropout(nn.Dropout):
    """torch's own; with a seed, `hashed_dropout`, whose elements are numbered from ``first`` on."""

    def forward(self, input: Tensor, seed_2: Tensor | None = None, first: int = 0) -> Tensor:
        return super().forward(input) if seed_2 is None else hashed_dropout(input, self.p, seed_2, first)


def draw_seed(device: torch.device) -> Tensor:
    """s and t, int32 [2], each of 31 bits: bounds that do not fit int32 are not safe in compiled code."""
    return torch.randint(2**31 - 1, (2,), dtype=torch.int32, device=device)


def kept(shape: torch.Size, p: float, seed_2: Tensor, first: int) -> Tensor:
    """Which elements of a tensor of this shape are kept: bool, each with probability 1 - p.

    Args:
        p: 0 up to below 1.
        seed_2: of `draw_seed`.
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
    """Elements of x that `kept` keeps, divided by 1 - p, and zeros elsewhere; the mask is computed again in backward."""
    return _again(_dropout, x, p, seed_2, first)


def hashed_gelu_dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    """`hashed_dropout` of GELU(x); compiled code computes even the result again from x where backward needs it."""
    return _again(_gelu_dropout, x, p, seed_2, first)


def _dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    return x * (1 / (1 - p)) * kept(x.shape, p, seed_2, first)


def _gelu_dropout(x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    return _dropout(gelu(x), p, seed_2, first)


def _again(function: Callable[[Tensor, float, Tensor, int], Tensor], x: Tensor, p: float, seed_2: Tensor, first: int) -> Tensor:
    """To a compiler this says what to compute again in backward; left to itself it saves some of the masks, and results. Numbers
    that two dropouts have in common it would save as well: hence ``first``."""
    return checkpoint(function, x, p, seed_2, first, use_reentrant=False, preserve_rng_state=False)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) of any shape, in the type of x.

    No autograd.Function: torch 2.11 gets those wrong in what is computed again.
    """
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
