"""The weights an engine computes with, which follow those of the model.

* float32 on a GPU: the model's own tensors. What is copied into them in place, raw weights for averaged ones, is there at once.
* bfloat16: a copy, refreshed in place where the model's tensors have changed, so that captured graphs stay valid.
* float32 on a CPU: a copy whose Linears are packed, made anew where the model's have changed.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from continuar.generation.packed import PackedLinear, pack_linears
from continuar.model import Model

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
