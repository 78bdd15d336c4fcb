"""Class labels: one learned vector per class (paper, Section 4). Without classes only the null condition is left: an unconditional
model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.conditions.base import Condition
from continuar.errors import require


@dataclass(frozen=True)
class LabelsConfig:
    """A class label, or none where the model has no classes."""

    kind: Literal["labels"] = "labels"
    labelled: ClassVar[bool] = True

    @property
    def count(self) -> int:
        """C, the number of condition tokens."""
        return 1

    def build(self, classes: int, width: int) -> Labels:
        """The condition for labels 0..classes-1 and a backbone of ``width``."""
        return Labels(classes, width)


class Labels(Condition):
    """See the module's docstring. Row ``classes`` of the embedding is the null condition, which may be given as a label too."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Parameter(torch.empty(classes + 1, width))
        nn.init.normal_(self.embedding, std=0.02)

    def embed(self, values: Tensor) -> Tensor:
        """int64 0..classes [B] -> [B, 1, E]."""
        require(
            values.ndim == 1 and values.dtype == torch.int64,
            f"the condition is {values.dtype} {list(values.shape)}; allowed: int64 labels [B], 0 to {self.classes} (no class)",
        )
        return F.embedding(values, self.embedding).unsqueeze(1)

    def null(self, batch: int) -> Tensor:
        return self.embedding[self.classes].expand(batch, 1, -1)
