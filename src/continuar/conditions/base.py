"""What a condition is: what a model is told about an image (or about nothing) -> condition tokens for the backbone.

A condition's config says how many condition tokens it makes (``count``, C) and whether it is told class labels (``labelled``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Condition(nn.Module, ABC):
    """Values of one kind -> C condition tokens of width E, and the null condition: what a dropped value becomes in training, and
    what the unconditional half of guidance sees."""

    @abstractmethod
    def embed(self, values: Tensor) -> Tensor:
        """Values [B, ...] -> condition tokens [B, C, E].

        Raises:
            UserError: values of another shape or type.
        """

    @abstractmethod
    def null(self, batch: int) -> Tensor:
        """The learned condition tokens [B, C, E] that stand for "no condition"."""

    def forward(self, values: Tensor, dropout: float = 0.0) -> Tensor:
        """Condition tokens [B, C, E]; each row is null with probability ``dropout`` (paper: 0.1)."""
        cond_BCE = self.embed(values)
        if dropout > 0:
            dropped_B = torch.rand(len(cond_BCE), device=cond_BCE.device) < dropout
            cond_BCE = torch.where(dropped_B[:, None, None], self.null(len(cond_BCE)), cond_BCE)
        return cond_BCE
