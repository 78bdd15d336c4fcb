"""The mixture head: p(x | z) as K Gaussians with diagonal covariance (GIVT, Tschannen et al. 2023).

p(x) = sum_k pi_k N(x; m_k, diag(s_k^2)), all of them linear in z (s through a softplus and a floor). Drawing, per row:

1. Invert the cumulative distribution of pi at one uniform number: the component.
2. x = m + temperature s n.

Guidance is GIVT's on densities (its Section 3.4): the target is p_c(x)^w p_u(x)^(1-w), unnormalised. GIVT draws from it by
rejection. This head draws ``candidates`` from p_c, weighs them by (p_c/p_u)^(w-1) and takes one by its weight (sampling importance
resampling, Rubin 1987), which costs the same for every row and needs no loop. Its samples stay near p_c: they approach the target
as the number of candidates grows, slowly if w is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.errors import check_sizes, require
from continuar.heads.base import Guidance, Head, HeadSample, HeadTraits, Options
from continuar.noise import Purpose, RowNoise
from continuar.tensors import check_rows, without_autocast


@dataclass(frozen=True)
class MixtureOptions(Options):
    """How to draw from the mixture. The temperature scales the components' standard deviations."""

    kind: Literal["mixture"] = "mixture"
    candidates: int = 64
    """Draws among which guidance chooses, 1 or more; without guidance there is one."""

    def __post_init__(self) -> None:
        require(self.candidates >= 1, f"candidates is {self.candidates}; allowed: 1 or more")


@dataclass(frozen=True)
class MixtureHeadConfig(HeadTraits):
    """A mixture of Gaussians with diagonal covariance; its loss is the negative log-likelihood."""

    kind: Literal["mixture"] = "mixture"
    components: int = 16
    """K, the number of Gaussians (GIVT: 16)."""
    min_std: float = 0.01
    """Floor of a component's standard deviation, in units of the tokens' (1): without one the likelihood of repeated values, such
    as a plain background, has no bound. Above 0."""
    has_log_prob: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sizes("head.", components=self.components)
        require(0 < self.min_std < math.inf, f"head.min_std is {self.min_std}; allowed: above 0")

    def options(self) -> MixtureOptions:
        return MixtureOptions()

    def build(self, token_size: int, cond_dim: int) -> MixtureHead:
        return MixtureHead(token_size, cond_dim, components=self.components, min_std=self.min_std)


class Mixture(NamedTuple):
    """Parameters of M mixtures: log pi [M, K], means and standard deviations [M, K, D], float32."""

    log_weight: Tensor
    mean: Tensor
    std: Tensor

    def log_prob(self, x_MSD: Tensor) -> Tensor:
        """Log-density of S points per mixture, [M, S]."""
        standard = (x_MSD.unsqueeze(2) - self.mean.unsqueeze(1)) / self.std.unsqueeze(1)
        constant = self.std.log().sum(-1) + 0.5 * math.log(2 * math.pi) * self.mean.shape[-1]
        return torch.logsumexp((self.log_weight - constant).unsqueeze(1) - 0.5 * standard.square().sum(-1), dim=-1)


class MixtureHead(Head):
    """Negative log-likelihood and sampling of one token given z.

    Args:
        token_dim: D. cond_dim: Z. components: K. min_std: floor of the standard deviations.
    """

    options_type = MixtureOptions

    def __init__(self, token_dim: int, cond_dim: int, components: int = 16, min_std: float = 0.01) -> None:
        super().__init__()
        check_sizes(token_dim=token_dim, cond_dim=cond_dim, components=components)
        self.token_size = self.token_dim = token_dim
        self.cond_dim, self.components, self.min_std = cond_dim, components, min_std
        self.parameters_of_z = nn.Linear(cond_dim, components * (1 + 2 * token_dim))
        nn.init.xavier_uniform_(self.parameters_of_z.weight)
        nn.init.zeros_(self.parameters_of_z.bias)

    def mixture(self, z: Tensor) -> Mixture:
        """The mixtures of z [M, Z]."""
        raw = self.parameters_of_z(z)
        with without_autocast(z):
            k, d = self.components, self.token_dim
            weight, mean, std = raw.float().split((k, k * d, k * d), dim=-1)
            # softplus(0.5413) = 1: components begin at the tokens' own standard deviation.
            std = F.softplus(std.unflatten(-1, (k, d)) + 0.5413) + self.min_std
            return Mixture(weight.log_softmax(-1), mean.unflatten(-1, (k, d)), std)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood in nats per dimension, [M], for z [M, Z] and x [M, D]."""
        check_rows(z, target, self.cond_dim, self.token_dim)
        mixture = self.mixture(z)
        with without_autocast(z):
            return -mixture.log_prob(target.float().unsqueeze(1)).squeeze(1) / self.token_dim

    def draw(
        self, z: Tensor, *, options: MixtureOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        with without_autocast(z):
            conditional = self.mixture(z.float())
            count = 1 if guidance is None else options.candidates
            x = self._candidates(conditional, count, temperature, noise)
            log_prob = conditional.log_prob(x)
            if guidance is not None:
                unconditional = self.mixture(guidance.z_uncond.float())
                log_weight = (guidance.scale - 1) * (log_prob - unconditional.log_prob(x))
                best = _invert(log_weight, noise.uniform(Purpose.TOKEN, 1, 1))
                x = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
                log_prob = log_prob.gather(1, best)
            return HeadSample(x.squeeze(1), log_prob.squeeze(1))

    def _candidates(self, mixture: Mixture, count: int, temperature: Tensor, noise: RowNoise) -> Tensor:
        """[M, count, D] independent draws of each mixture."""
        component = _invert(mixture.log_weight, noise.uniform(Purpose.TOKEN, 0, count)).unsqueeze(-1).expand(-1, -1, self.token_dim)
        normal = noise.normal(Purpose.INITIAL, 0, count * self.token_dim).view_as(component)
        return mixture.mean.gather(1, component) + temperature * mixture.std.gather(1, component) * normal


def _invert(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Indices [M, S] drawn by weights [M, K] at uniform numbers [M, S] in (0, 1]."""
    cumulative = log_weight.softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=log_weight.shape[-1] - 1)
