"""A Gaussian target, for which the exact network is affine: so a sampler is an affine map of its noise and is compared exactly.

1. `Gaussian.denoise`: eps and v in closed form.
2. `push`: the sampler run on zero and on every unit vector of x_T and of each step's noise gives that affine map, whole.
3. `Affine.mean`, `Affine.covariance`: what the sampler makes of standard normal noise, with no sampling error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from continuar.diffusion.gaussian import Schedule, coefficients, training_schedule
from continuar.diffusion.samplers import Sampler

ABAR = torch.from_numpy(training_schedule().abar)
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gaussian:
    """N(mean [D], covariance [D, D]), float64."""

    mean: Tensor
    covariance: Tensor

    def marginal(self, t: Tensor | int) -> Tensor:
        """The covariance of x_t."""
        return ABAR[t] * self.covariance + (1 - ABAR[t]) * torch.eye(len(self.mean), dtype=torch.float64)

    def denoise(self, schedule: Schedule) -> Denoise:
        """eps = E[noise | x_t], and v such that the reverse step's variance is exact, which needs independent dimensions."""
        c = coefficients(schedule)
        index = {t: i for i, t in enumerate(schedule.timesteps)}

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            i, marginal = index[int(t)], self.marginal(t)
            eps = (1 - ABAR[t]).sqrt() * torch.linalg.solve(marginal, (x - ABAR[t].sqrt() * self.mean).T).T
            low, high = c.log_posterior_variance[i].double(), c.log_beta[i].double()
            of_x0 = self.covariance.diagonal() * (1 - ABAR[t]) / marginal.diagonal()  # Var[x_0 | x_t]
            variance = low.exp() + c.mean_from_x0[i].double().square() * of_x0
            return eps, (2 * (variance.log() - low) / (high - low) - 1).expand_as(x)

        return denoise

    def flow(self, last: int) -> Affine:
        """The exact probability flow from x_last to x_0 (Song et al. 2021b): both sides whitened by their own covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        scale = (values / (ABAR[last] * values + 1 - ABAR[last])).sqrt()
        matrix = vectors @ torch.diag(scale) @ vectors.T
        return Affine(self.mean - ABAR[last].sqrt() * matrix @ self.mean, matrix, matrix.new_zeros(0, *matrix.shape))


@dataclass(frozen=True)
class Affine:
    """x_0 = offset [D] + matrix [D, D] x_T + sum over steps of noise [S, D, D] times the step's noise."""

    offset: Tensor
    matrix: Tensor
    noise: Tensor

    @property
    def mean(self) -> Tensor:
        return self.offset

    @property
    def covariance(self) -> Tensor:
        return self.matrix @ self.matrix.T + torch.einsum("sij,skj->ik", self.noise, self.noise)


def push(run: Sampler, denoise: Denoise, schedule: Schedule, dim: int, temperature: float = 1.0) -> Affine:
    """The sampler as an affine map."""
    steps, eye = len(schedule), torch.eye(dim, dtype=torch.float64)
    rows = 1 + dim * (1 + steps)
    x = torch.zeros(rows, dim, dtype=torch.float64)
    x[1 : 1 + dim] = eye

    def step_noise(i: int) -> Tensor:
        noise = torch.zeros(rows, dim, dtype=torch.float64)
        noise[1 + dim * (1 + i) : 1 + dim * (2 + i)] = eye
        return noise

    out = run(denoise, x, coefficients(schedule), temperature=torch.tensor(temperature), step_noise=step_noise)
    columns = (out[1:] - out[0]).view(1 + steps, dim, dim).mT
    return Affine(out[0], columns[0], columns[1:])


def distance(a: Affine, b: Affine) -> float:
    """The largest difference of offset and matrix."""
    return max((a.offset - b.offset).abs().max().item(), (a.matrix - b.matrix).abs().max().item())
