"""Conditions: class labels or vectors -> condition tokens [B, C, E] for the backbone, and the null condition.

A condition's config gives C as ``count``, and ``labelled``: True if its values are class labels. `ConditionConfig` is the closed
table of conditions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.errors import check_sizes, require


class Condition(nn.Module, ABC):
    """Values of one kind -> C condition tokens of width E.

    The null condition stands for dropped values in training, and for the unconditional half of guidance in sampling.
    """

    @abstractmethod
    def check(self, values: Tensor) -> None:
        """Refuses values of another shape or type; sampling calls this on what a user gives."""

    @abstractmethod
    def embed(self, values: Tensor) -> Tensor:
        """Values [B, ...] -> condition tokens [B, C, E]."""

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
    """A class label, or none if the model has no classes."""

    kind: Literal["labels"] = "labels"
    count: ClassVar[int] = 1
    labelled: ClassVar[bool] = True

    def build(self, classes: int, width: int) -> Labels:
        return Labels(classes, width)


class Labels(Condition):
    """Class labels, one learned vector each (paper, Section 4). Row ``classes`` is the null condition, and a label too."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Parameter(torch.empty(classes + 1, width))
        nn.init.normal_(self.embedding, std=0.02)

    def check(self, values: Tensor) -> None:
        require(
            values.ndim == 1 and values.dtype == torch.int64,
            f"the condition is {values.dtype} {list(values.shape)}; allowed: int64 labels [B], 0 to {self.classes} (no class)",
        )

    def embed(self, values: Tensor) -> Tensor:
        """int64 0..classes [B] -> [B, 1, E]."""
        assert values.ndim == 1, values.shape
        return F.embedding(values, self.embedding).unsqueeze(1)

    def null(self, batch: int) -> Tensor:
        return self.embedding[self.classes].expand(batch, 1, -1)


@dataclass(frozen=True)
class VectorsConfig:
    """A sequence of ``count`` vectors of dimension ``dim``."""

    dim: int
    """Dimension of a condition vector; of about unit scale."""
    count: int = 1
    """Number of condition vectors."""
    kind: Literal["vectors"] = "vectors"
    labelled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("condition.", dim=self.dim, count=self.count)

    def build(self, classes: int, width: int) -> Vectors:
        """The condition for a backbone of ``width``; there are no classes."""
        return Vectors(self, width)


class Vectors(Condition):
    """A sequence of vectors, such as a text encoder's output: a linear projection of each + the learned position of its place.

    Sequences have a fixed length: the caller pads shorter ones, with zeros or with a vector that means "nothing here".
    """

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

    def check(self, values: Tensor) -> None:
        require(
            values.shape[1:] == (self.count, self.dim) and values.is_floating_point(),
            f"the condition is {values.dtype} {list(values.shape)}; allowed: floats [B, {self.count}, {self.dim}]",
        )

    def embed(self, values: Tensor) -> Tensor:
        """Floats [B, C, dim] -> [B, C, E]."""
        assert values.shape[1:] == (self.count, self.dim), values.shape
        return self.projection(values) + self.positions

    def null(self, batch: int) -> Tensor:
        return self.null_tokens.expand(batch, -1, -1)


ConditionConfig = LabelsConfig | VectorsConfig
