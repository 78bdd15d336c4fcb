"""GELU for compiled code (Hendrycks & Gimpel 2016), value and derivative by one exponential.

Kernels that hold a GELU and a dropout's hash wait for arithmetic, not for memory, and of all that an error function is the most
(docs/results.md, "The speed of training").

x Phi(x) has the derivative Phi(x) + x phi(x), whose second term is the derivative of -phi(x). With sg for "held fixed",
    x Phi(sg x) - (phi(x) - phi(sg x))
has the value and the derivative of both, and all of it comes from exp(-x^2/2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
