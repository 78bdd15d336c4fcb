"""What a head is: the model of one token's distribution given its condition vector z."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from continuar.diffusion.samplers import SamplerName, check_sampler
from continuar.guidance import Guidance
from continuar.noise import RowNoise

TokenKind = Literal["vector", "id"]


@dataclass(frozen=True)
class HeadOptions:
    """How to draw a token. Everything a captured graph may not bake in (temperature) is handed over as a tensor beside it."""

    diffusion_steps: int = 100
    sampler: SamplerName = "ddpm"

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.diffusion_steps)


@dataclass(frozen=True)
class HeadSample:
    """Drawn tokens [M, D] (or ids [M]) and, from heads that have one, their log-probability [M]."""

    tokens: Tensor
    log_prob: Tensor | None = None


class Head(nn.Module, ABC):
    """z -> loss in training, z -> token in generation. Rows M are independent of one another."""

    token_kind: TokenKind = "vector"

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss: what training calls, so that compilation and parallel wrappers can take hold of the head."""
        return self.loss(z, target)

    @abstractmethod
    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """One value per row [M] for z [M, Z] and target [M, D] (or ids [M]); differentiable in z and the head."""

    @abstractmethod
    def draw(
        self, z: Tensor, *, options: HeadOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        """Draws one token per row of z [M, Z], a pure function of its arguments.

        Args:
            temperature: 0-d tensor >= 0.
            noise: the rows' randomness.
            guidance: the unconditional vectors [M, Z] and the scale, or None.
        """
