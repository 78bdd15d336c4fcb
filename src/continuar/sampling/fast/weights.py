"""Weights of the fast engine, which follow those of the model.

* float32 on a GPU: the model's own tensors.
* bfloat16: a copy, written anew before every generation.
* float32 on a CPU: the model's own tensors, and for each Linear a copy of its weight in oneDNN's layout. PyTorch's own product
  changes the layout in every call, which takes most of the time of a small model's head. The copies are compared with the model
  before every generation.
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

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIN_PACKED_WORK = 4_000_000
"""Multiplications from which a packed product is faster; below, its start costs more than it saves."""
_LOG = logging.getLogger(__name__)


@cache
def _operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """(pack, multiply), or None if this build lacks them or they are wrong. Inductor calls them for frozen weights."""
    reason = "their product is wrong"
    try:
        pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        x, weight, bias = torch.ones(3, 5), torch.arange(20.0).view(4, 5), torch.ones(4)
        packed = pack(weight, None)
        right = torch.equal(multiply(x, packed, bias, "none", [], ""), F.linear(x, weight, bias))
        if right and torch.equal(packed.to_dense(), weight):
            return pack, multiply
    except (AttributeError, RuntimeError, TypeError) as problem:
        reason = str(problem).split("\n", maxsplit=1)[0]
    _LOG.warning("weights are not packed on this CPU (%s): the fast engine is slower, its images are the same", reason)
    return None


class PackedLinear(nn.Module):
    """`nn.Linear` of float32 on a CPU, for inference, with a packed copy of its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        operators = _operators()
        self._multiply = operators[1] if operators else None
        self._packed = operators[0](self.weight.contiguous(), None) if operators else None

    def is_current(self) -> bool:
        """Whether the packed copy still equals the weight, which the caller may have changed in place."""
        return self._packed is None or torch.equal(self._packed.to_dense(), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self._multiply is None or rows * self.weight.numel() < MIN_PACKED_WORK:
            return F.linear(x, self.weight, self.bias)
        y = self._multiply(x.reshape(rows, -1), self._packed, self.bias, "none", [], "")
        return y.view(*x.shape[:-1], -1)


def pack_linears(module: nn.Module) -> None:
    """Replaces every `nn.Linear` inside a module by its packed form."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


def sliced_linear(linear: nn.Linear | PackedLinear, rows: slice) -> nn.Linear:
    """Some outputs of a Linear. Its weight is a view, so it follows what is written into the full weight."""
    assert linear.bias is not None
    weight, bias = linear.weight[rows].detach(), linear.bias[rows].detach()
    out = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    out.weight, out.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return out


class EngineWeights:
    """The model, and the model that the engine computes with.

    Attributes:
        exact: the model itself, float32.
        fast: the copy, or the model itself on a GPU in float32.
        version: how often ``fast`` was made; captured graphs and buffers of an older version are invalid.
    """

    def __init__(self, model: Model, precision: Precision) -> None:
        self.exact, self.dtype, self.version = model, DTYPES[precision], 0
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings ``fast`` up to date with the model.

        Values are compared or copied, not version counters: a write through ``.data`` leaves a tensor's ``_version`` as it was.
        """
        addresses = tuple(p.data_ptr() for p in self.exact.parameters())
        if self.version == 0 or addresses != self._addresses:
            # Captured graphs read the model's tensors at their addresses, so other tensors make the old graphs invalid.
            self._make(addresses)
        elif self.dtype != torch.float32:
            torch._foreach_copy_(list(self.fast.parameters()), list(self.exact.parameters()))  # pyright: ignore
        elif not all(module.is_current() for module in self.fast.modules() if isinstance(module, PackedLinear)):
            self._make(addresses)

    def _make(self, addresses: tuple[int, ...]) -> None:
        self._addresses, self.version = addresses, self.version + 1
        if self.dtype != torch.float32:
            self.fast = copy.deepcopy(self.exact).to(self.dtype).requires_grad_(False)
        elif next(self.exact.parameters()).device.type == "cpu":
            # With its tensors in the memo, deepcopy copies the modules and shares the tensors.
            shared = {id(tensor): tensor for tensor in (*self.exact.parameters(), *self.exact.buffers())}
            self.fast = copy.deepcopy(self.exact, shared)
            pack_linears(self.fast)
        else:
            self.fast = self.exact
