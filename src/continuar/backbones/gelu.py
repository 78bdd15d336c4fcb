"""GELU for compiled code (Hendrycks & Gimpel 2016), value and derivative by one exponential.

Kernels that hold a GELU and a dropout's hash wait for arithmetic, not for memory: one exponential is less of it than an error
function and, backward, an exponential beside it (docs/results.md, "The speed of training").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) of any shape, in the type of x, with its derivative Phi(x) + x phi(x).

    The term whose value is 0 carries the derivative; torch 2.11 gets an autograd.Function wrong in what is computed again.
    """
    exact = x.float()
    fixed = exact.detach()
    cumulative, density = _normal(fixed)
    return (fixed * cumulative + (exact - fixed) * (cumulative + fixed * density)).to(x.dtype)


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Phi and phi of the standard normal, in float32; Phi by Abramowitz & Stegun 7.1.26, at most 1e-7 off."""
    bell = torch.exp(x * x * -0.5)
    t = 1 / (1 + 0.3275911 / math.sqrt(2) * x.abs())
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * polynomial * bell
    return torch.where(x < 0, tail, 1 - tail), bell * (1 / math.sqrt(2 * math.pi))
