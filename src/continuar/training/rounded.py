"""bfloat16 copies of the blocks' matrices, made once per step.

Autocast rounds a weight where it is used: compiled parts do so in kernels of their own, and turn its gradient back into float32 in
others before anything reads it. With copies, one launch rounds all matrices, and gradients are widened where they are collected
anyway. The numbers are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continuar.backbones.blocks import Block


class RoundedMatrices:
    """A module that computes with such copies where bfloat16 autocast would make them.

    Args:
        module: whatever contains the blocks.
        bf16: whether autocast is on; without it there are no copies.

    Attributes:
        leaves: what to differentiate by, in the order of the module's parameters: a copy where there is one. A copy's gradient, in
            bfloat16, is the parameter's.
    """

    def __init__(self, module: nn.Module, bf16: bool) -> None:
        self._module = module
        linears = (
            f"{name}.{inner}.weight"
            for name, block in module.named_modules()
            if bf16 and isinstance(block, Block)
            for inner, part in block.named_modules()
            if isinstance(part, nn.Linear)
        )
        parameters = dict(module.named_parameters())
        self._sources = {name: parameters[name].detach() for name in linears}
        self._copies = {name: torch.empty_like(p, dtype=torch.bfloat16).requires_grad_() for name, p in self._sources.items()}
        self.leaves = [self._copies.get(name, p) for name, p in parameters.items()]

    @torch.no_grad()
    def round(self) -> None:
        """Makes the copies those of the present weights."""
        if self._copies:
            torch._foreach_copy_([*self._copies.values()], [*self._sources.values()])  # pyright: ignore[reportPrivateImportUsage]

    def __call__(self, *given: object) -> Tensor:
        """The module's forward."""
        return functional_call(self._module, self._copies, given)
