"""A sequence of vectors: what a text encoder gives, or any attributes.

1. Each vector -> a linear projection to the backbone's width + the learned position of its place in the sequence.
2. The null condition is a learned sequence of the same length.

Sequences have a fixed length: whoever makes the vectors pads shorter ones, with zeros or with a vector that means "nothing here".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from continuar.conditions.base import Condition
from continuar.errors import require


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
