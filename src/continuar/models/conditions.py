"""What a condition is: what a model is told about an image (or about nothing) -> condition tokens for the backbone.

A condition's config says how many condition tokens it makes (``count``, C) and whether it is told class labels (``labelled``).

Class labels: one learned vector per class (paper, Section 4). Without classes only the null condition is left: an unconditional
model.

A sequence of vectors: what a text encoder gives, or any attributes.

1. Each vector -> a linear projection to the backbone's width + the learned position of its place in the sequence.
2. The null condition is a learned sequence of the same length.

Sequences have a fixed length: whoever makes the vectors pads shorter ones, with zeros or with a vector that means "nothing here".

Conditions: what a model is told -> condition tokens. `ConditionConfig` is the closed table of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.errors import require


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


@dataclass(frozen=True)
class VectorsConfig:
    """A sequence of ``count`` vectors of dimension ``dim``."""

    dim: int
    """Dimension of a condition vector; of about unit scale."""
    count: int = 1
    """C, the number of condition vectors."""
    kind: Literal["vectors"] = "vectors"
    labelled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("dim", "count"):
            require(getattr(self, name) >= 1, f"condition.{name} is {getattr(self, name)}; allowed: 1 or more")

    def build(self, classes: int, width: int) -> Vectors:
        """The condition for a backbone of ``width``; there are no classes."""
        return Vectors(self, width)


class Vectors(Condition):
    """See the module's docstring."""

    def __init__(self, config: VectorsConfig, width: int) -> None:
        super().__init__()
        self.count, self.dim = config.count, config.dim
        self.projection = nn.Linear(config.dim, width)
        self.positions = nn.Parameter(torch.empty(config.count, width))
        self.null_tokens = nn.Parameter(torch.empty(config.count, width))
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.null_tokens, std=0.02)

    def embed(self, values: Tensor) -> Tensor:
        """Floats [B, C, dim] -> [B, C, E]."""
        require(
            values.shape[1:] == (self.count, self.dim) and values.is_floating_point(),
            f"the condition is {values.dtype} {list(values.shape)}; allowed: floats [B, {self.count}, {self.dim}]",
        )
        return self.projection(values) + self.positions

    def null(self, batch: int) -> Tensor:
        return self.null_tokens.expand(batch, -1, -1)


ConditionConfig = LabelsConfig | VectorsConfig

__all__ = ["Condition", "ConditionConfig", "Labels", "LabelsConfig", "Vectors", "VectorsConfig"]
