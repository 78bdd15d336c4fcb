"""Linear layers for a CPU: weights laid out once as oneDNN reads them, where PyTorch's own product lays them out at every call.

The products of a small model's head are where a CPU's time goes (docs/speed.md has what the engine gains). The operators are those
that Inductor calls for frozen weights; a build without them, which is said once, and products too small to gain go through
`torch.nn.functional.linear`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LOG = logging.getLogger(__name__)

LARGE = 4_000_000
"""Multiplications from which on a packed product is faster; below, starting it costs more."""


@cache
def _operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """(pack, multiply) where this build has them and they give a right answer, else None."""
    reason = "their product is wrong"
    try:
        pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        x, weight, bias = torch.ones(3, 5), torch.arange(20.0).view(4, 5), torch.ones(4)
        if torch.equal(multiply(x, pack(weight, None), bias, "none", [], ""), F.linear(x, weight, bias)):
            return pack, multiply
    except (AttributeError, RuntimeError, TypeError) as problem:
        reason = str(problem).split("\n", maxsplit=1)[0]
    _LOG.warning("weights are not packed on this CPU (%s): the fast engine is slower, its images are the same", reason)
    return None


class PackedLinear(nn.Module):
    """`nn.Linear` of float32 on a CPU, in inference. It holds its own copy of the weight as it was when this was made."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        operators = _operators()
        self._multiply = operators[1] if operators else None
        self._packed = operators[0](self.weight.contiguous(), None) if operators else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self._multiply is None or rows * self.weight.numel() < LARGE:
            return F.linear(x, self.weight, self.bias)
        y = self._multiply(x.reshape(rows, -1), self._packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], -1)


def pack_linears(module: nn.Module) -> None:
    """Replaces every `nn.Linear` within by its packed form."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
