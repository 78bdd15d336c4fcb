"""Linear layers for a CPU: weights laid out once as oneDNN reads them, where PyTorch's own product lays them out at every call.

The products of a small model's head are where a CPU's time goes (docs/speed.md has what the engine gains). The operators are those
that Inductor calls for frozen weights; a build without them, which is said once, and products too small to gain go through
`torch.nn.functional.linear`.

The weights an engine computes with, which follow those of the model.

* float32 on a GPU: the model's own tensors. What is copied into them in place, raw weights for averaged ones, is there at once.
* bfloat16: a copy, refreshed in place where the model's tensors have changed, so that captured graphs stay valid.
* float32 on a CPU: a copy whose Linears are packed, made anew where the model's have changed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.models.autoregressive import Model

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


Precision = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Weights:
    """See the module's docstring.

    Attributes:
        exact: the model itself, float32. fast: what the engine computes with.
        made: counts how often ``fast`` was made; whoever holds parts of it holds them for one count.
    """

    def __init__(self, model: Model, precision: Precision) -> None:
        self.exact, self.dtype, self.made = model, DTYPES[precision], 0
        self.refresh()

    def refresh(self) -> None:
        """Follows the model."""
        if self.made and self._seen == self._state():
            return
        same_tensors = self.made and self._where == self._places()
        if same_tensors and self.fast is self.exact:
            return
        if same_tensors and self.dtype != torch.float32:
            with torch.no_grad():
                for target, source in zip(self.fast.parameters(), self.exact.parameters(), strict=True):
                    target.copy_(source)
        else:
            self.fast = self._make()
            self.made += 1
        self._seen, self._where = self._state(), self._places()

    def _make(self) -> Model:
        if self.dtype != torch.float32:
            return copy.deepcopy(self.exact).to(self.dtype).requires_grad_(False)
        if next(self.exact.parameters()).device.type != "cpu":
            return self.exact
        fast = _shallow(self.exact)
        pack_linears(fast)
        return fast

    def _places(self) -> tuple[int, ...]:
        return tuple(p.data_ptr() for p in self.exact.parameters())

    def _state(self) -> tuple[tuple[int, int], ...]:
        """Which tensors, and how often each was written to."""
        return tuple((p.data_ptr(), p._version) for p in self.exact.parameters())


def _shallow(model: Model) -> Model:
    """A copy of the modules that shares their tensors."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def sliced_linear(linear: nn.Linear | PackedLinear, rows: slice) -> nn.Linear:
    """Some outputs of a Linear, as a Linear whose weight is a view: it follows what is written into the whole one."""
    assert linear.bias is not None
    weight, bias = linear.weight[rows].detach(), linear.bias[rows].detach()
    out = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    out.weight, out.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return out
