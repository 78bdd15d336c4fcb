"""All tokens of an image at once, as models have it that know no order."""

from __future__ import annotations

import torch
from torch import Tensor

from continuar.errors import require
from continuar.orders import Order


class WholeOrder(Order):
    """One step that predicts every token. Nothing can be known beforehand."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        require(
            steps in (None, 1),
            f"steps is {steps}; the model makes all tokens of an image in one; allowed: 1, or not given (but see diffusion_steps)",
        )
        known = self.positions - unknown
        require(unknown in (0, self.positions), f"{known} tokens are known; the model makes whole images; allowed: none, or all")
        return (unknown,) if unknown else ()

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return self.training_order(len(known_BN), known_BN.device)

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.arange(self.positions, device=device).expand(batch, -1)
