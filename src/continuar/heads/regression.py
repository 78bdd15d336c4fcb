"""The regression head: plain L2 on the token, the control of the diffusion loss (paper, Section 5: FID above 100).

It has one answer per z and so no distribution: with several plausible tokens it gives their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from continuar.errors import check_sizes, require
from continuar.heads.base import Guidance, Head, HeadSample, HeadTraits, Options
from continuar.heads.diffusion import guided
from continuar.noise import RowNoise
from continuar.tensors import check_rows, without_autocast


@dataclass(frozen=True)
class RegressionOptions(Options):
    """No options: the regression head draws nothing."""

    kind: Literal["regression"] = "regression"

    def check_temperature(self, temperature: float) -> None:
        require(temperature == 1.0, f"temperature is {temperature}; a regression head draws nothing; allowed: 1.0")


@dataclass(frozen=True)
class RegressionHeadConfig(HeadTraits):
    """Plain L2, by an MLP of the diffusion head's default size."""

    kind: Literal["regression"] = "regression"
    width: int = 1024
    """Width of the hidden layers."""
    depth: int = 3
    """Hidden layers."""

    def __post_init__(self) -> None:
        check_sizes("head.", width=self.width, depth=self.depth)

    def options(self) -> RegressionOptions:
        return RegressionOptions()

    def build(self, token_size: int, cond_dim: int) -> RegressionHead:
        return RegressionHead(token_size, cond_dim, width=self.width, depth=self.depth)


class RegressionHead(Head):
    """Squared error, and the mean as the drawn token.

    Args:
        token_dim: D. cond_dim: Z. width, depth: of the MLP.
    """

    options_type = RegressionOptions

    def __init__(self, token_dim: int, cond_dim: int, width: int = 1024, depth: int = 3) -> None:
        super().__init__()
        check_sizes(token_dim=token_dim, cond_dim=cond_dim, width=width, depth=depth)
        self.token_size = self.token_dim = token_dim
        self.cond_dim = cond_dim
        sizes = [cond_dim, *[width] * depth]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, token_dim))
        for module in self.net:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Squared error, mean over dimensions: [M] for z [M, Z] and x [M, D]."""
        check_rows(z, target, self.cond_dim, self.token_dim)
        return (self.net(z).float() - target.float()).square().mean(-1)

    def draw(
        self, z: Tensor, *, options: RegressionOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        with without_autocast(z):
            mean = self.net(z.float())
            if guidance is not None:
                mean = guided(mean, self.net(guidance.z_uncond.float()), guidance.scale)
            return HeadSample(mean)
