"""Gaussian diffusion with a learned variance range (Nichol & Dhariwal 2021): schedule, process and loss (paper, Eq. 1).

1. `cosine_betas` and `training_schedule`: the training process of T = 1000 steps, in float64 on the host.
2. A time grid (`uniform_t`; others in `time_grids`) says which of the T steps a sampler visits; `Schedule.respace` makes the
   coarser process that visits only those, with the same marginals there.
3. `coefficients`: a schedule as float32 tensors on a device; `add_noise`, `predict_x0`, `posterior_mean`, `log_variance` use them.
4. `loss_terms`: Eq. 1, and the variational bound that trains the variance.

All functions are pure and run in float32 whatever the autocast state: at 100 steps the first update multiplies an error of eps by
about 316. ``i`` indexes the steps of the given process, one per row; x, eps, v have shape [M, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from continuar.errors import require
from continuar.tensors import without_autocast

TRAIN_STEPS = 1000
"""T, the steps of the training process."""

Grid = Callable[[int], tuple[int, ...]]
"""A time grid: the number of steps -> that many timesteps of the training process, ascending from 0. Refuses other numbers."""
Prediction = Literal["epsilon", "v_prediction"]
"""The quantity that a network predicts: the noise, or the velocity of Salimans & Ho 2022."""


# --- Schedule


def cosine_betas(steps: int, cap: float = 0.999) -> np.ndarray:
    """beta_t = min(1 - abar(t+1)/abar(t), cap), abar(t) = cos^2((t/T + 0.008)/1.008 * pi/2) (Nichol & Dhariwal, Eq. 17)."""
    abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], cap)


# Compared by identity: schedules are cached, and so are the coefficients that belong to them.
@dataclass(frozen=True, eq=False)
class Schedule:
    """One diffusion process. Arrays are float64 [S]; index 0 is the least noisy step.

    Attributes:
        timesteps: the original timesteps (0..T-1) of the S steps; the network's input, also after respacing.
        betas: beta_i of this (possibly respaced) process.
    """

    timesteps: tuple[int, ...]
    betas: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def abar(self) -> np.ndarray:
        """Cumulative products of 1 - beta."""
        return np.cumprod(1 - self.betas)

    @property
    def log_snr(self) -> np.ndarray:
        """log(abar / (1 - abar)), the log of signal variance over noise variance; falls with the index."""
        abar = self.abar
        return np.log(abar) - np.log1p(-abar)

    def respace(self, timesteps: Sequence[int]) -> Schedule:
        """The process that visits only ``timesteps`` (ascending indices into this one), with the same marginals there."""
        abar = self.abar[list(timesteps)]
        return Schedule(tuple(self.timesteps[t] for t in timesteps), 1 - abar / np.append(1.0, abar[:-1]))


@lru_cache
def training_schedule(steps: int = TRAIN_STEPS) -> Schedule:
    """The process every diffusion head trains with: cosine, 1000 steps by default."""
    return Schedule(tuple(range(steps)), cosine_betas(steps))


def uniform_t(steps: int, last: int = TRAIN_STEPS - 1) -> tuple[int, ...]:
    """The grid of ``steps`` timesteps evenly spaced from 0 to ``last``, both included: round(i last/(n-1))."""
    require(1 <= steps <= last + 1, f"diffusion steps is {steps}; allowed: 1 to {last + 1}")
    return (last,) if steps == 1 else tuple(round(i * last / (steps - 1)) for i in range(steps))


@lru_cache(maxsize=256)
def sampling_schedule(steps: int, grid: Grid = uniform_t) -> Schedule:
    """The training process respaced to the ``steps`` timesteps of ``grid``."""
    return training_schedule().respace(grid(steps))


# --- Process


@dataclass(frozen=True)
class Coefficients:
    """A schedule's coefficients as float32 tensors [S] on a device, rounded once from float64."""

    timesteps: Tensor  # int64, original timesteps
    abar: Tensor
    abar_previous: Tensor
    sqrt_abar: Tensor
    sqrt_one_minus_abar: Tensor
    x0_from_x: Tensor  # sqrt(1/abar)
    x0_from_eps: Tensor  # sqrt(1/abar - 1)
    mean_from_x0: Tensor  # posterior mean = mean_from_x0 x0 + mean_from_x x
    mean_from_x: Tensor
    log_beta: Tensor  # the upper end of the variance range
    log_posterior_variance: Tensor  # the lower end, entry 0 replaced by entry 1 (it would be log 0)

    def __len__(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=256)
def coefficients(schedule: Schedule, device: torch.device | str = "cpu") -> Coefficients:
    """The coefficients of ``schedule`` on ``device``."""
    betas, abar = schedule.betas, schedule.abar
    previous = np.append(1.0, abar[:-1])
    posterior = betas * (1 - previous) / (1 - abar)
    # With a single step there is no entry 1 to borrow; its own beta stands in.
    posterior[0] = posterior[1] if len(betas) > 1 else betas[0]
    values = {
        "abar": abar,
        "abar_previous": previous,
        "sqrt_abar": np.sqrt(abar),
        "sqrt_one_minus_abar": np.sqrt(1 - abar),
        "x0_from_x": np.sqrt(1 / abar),
        "x0_from_eps": np.sqrt(1 / abar - 1),
        "mean_from_x0": betas * np.sqrt(previous) / (1 - abar),
        "mean_from_x": (1 - previous) * np.sqrt(1 - betas) / (1 - abar),
        "log_beta": np.log(betas),
        "log_posterior_variance": np.log(posterior),
    }
    tensors = {name: torch.from_numpy(value).to(torch.float32).to(device) for name, value in values.items()}
    return Coefficients(torch.tensor(schedule.timesteps, device=device), **tensors)


# torch.compile takes the result as a constant; it would trace the numpy code otherwise.
@torch.compiler.assume_constant_result
def training_coefficients(device: torch.device) -> Coefficients:
    """The coefficients of the training process."""
    return coefficients(training_schedule(), device)


def _at(values: Tensor, i: Tensor | int) -> Tensor:
    """One coefficient per row as [M, 1], or a 0-d tensor for an index common to all rows."""
    return values[i] if isinstance(i, int) else values[i].unsqueeze(-1)


def add_noise(c: Coefficients, x0: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (paper, Section 3.2)."""
    return _at(c.sqrt_abar, i) * x0 + _at(c.sqrt_one_minus_abar, i) * eps


def predict_x0(c: Coefficients, x: Tensor, i: Tensor | int, eps: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); not clipped (latents have no range)."""
    return _at(c.x0_from_x, i) * x - _at(c.x0_from_eps, i) * eps


def posterior_mean(c: Coefficients, x0: Tensor, x: Tensor, i: Tensor | int) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 7)."""
    return _at(c.mean_from_x0, i) * x0 + _at(c.mean_from_x, i) * x


def log_variance(c: Coefficients, v: Tensor, i: Tensor | int) -> Tensor:
    """Learned range: f log beta_t + (1 - f) log posterior variance, f = (v + 1)/2 (Nichol & Dhariwal 2021, Eq. 15)."""
    f = (v + 1) / 2
    return f * _at(c.log_beta, i) + (1 - f) * _at(c.log_posterior_variance, i)


def velocity(c: Coefficients, x0: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022)."""
    return _at(c.sqrt_abar, i) * eps - _at(c.sqrt_one_minus_abar, i) * x0


def eps_from_velocity(c: Coefficients, x: Tensor, i: Tensor | int, v: Tensor) -> Tensor:
    """eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t. At high t this is nearly x_t, whatever the network predicts."""
    return _at(c.sqrt_abar, i) * v + _at(c.sqrt_one_minus_abar, i) * x


def predicted_eps(prediction: Prediction, c: Coefficients, x: Tensor, i: Tensor | int, out: Tensor) -> Tensor:
    """eps from the network's output."""
    return out if prediction == "epsilon" else eps_from_velocity(c, x, i, out)


# --- Loss


@dataclass(frozen=True)
class LossTerms:
    """The two terms of the loss, one value per row [M]: mse of the network's prediction, and vb in bits per dimension."""

    mse: Tensor
    vb: Tensor

    @property
    def total(self) -> Tensor:
        """The training loss: MSE + VB, unweighted."""
        return self.mse + self.vb


def loss_terms(
    network: Callable[[Tensor], tuple[Tensor, Tensor]], prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor
) -> LossTerms:
    """Eq. 1: || eps - eps_theta(x_t | t, z) ||^2, and the variational bound.

    Args:
        network: x_t -> (prediction, v); the only part that runs under autocast.
        x0: [..., D], broadcast. t: timesteps [...] in 0..999. noise: eps [..., D].
    """
    c = training_coefficients(x0.device)
    x0, noise = x0.float(), noise.float()
    with without_autocast(x0):
        x = add_noise(c, x0, t, noise)
    out, v = network(x)
    with without_autocast(x0):
        out, target = out.float(), noise if prediction == "epsilon" else velocity(c, x0, t, noise)
        eps = predicted_eps(prediction, c, x, t, out)
        return LossTerms((target - out).square().mean(-1), variational_bound(c, eps, v.float(), x0, x, t))


def variational_bound(c: Coefficients, eps: Tensor, v: Tensor, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
    """The variational bound in bits per dimension, [M] (Nichol & Dhariwal 2021, Eq. 4-6).

    Args:
        eps, v: the network's noise prediction and variance interpolation for x = add_noise(x0, i, noise).
        i: [M] step indices of the process ``c``.
    """
    truth = posterior_mean(c, x0, x, i)
    truth_log_variance = _at(c.log_posterior_variance, i)
    # The bound trains only the variance; the MSE trains the mean.
    mean = posterior_mean(c, predict_x0(c, x, i, eps.detach()), x, i)
    logvar = log_variance(c, v, i)
    kl = 0.5 * (logvar - truth_log_variance - 1 + (truth_log_variance - logvar).exp() + (truth - mean).square() * (-logvar).exp())
    nll = -_discretized_log_likelihood(x0, mean, logvar / 2)
    return torch.where(i == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)


def _normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's CDF by the tanh approximation that image diffusion uses; kept so that numbers agree."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the 2/255-wide bin around x, edges open at +-0.999, floored at 1e-12 (Ho et al. 2020, Eq. 13)."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
