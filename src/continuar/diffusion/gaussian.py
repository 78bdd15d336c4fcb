"""Noise schedules and their respacing, in float64 on the host.

1. `cosine_betas`: the training process of T steps (Nichol & Dhariwal 2021, Eq. 17).
2. A time grid, `uniform_t` or `uniform_log_snr`: which of the T steps a sampler visits (`spaced` and `strided` serve any T).
3. `Schedule.respace`: the coarser process that visits only those, from the ratios of the kept cumulative products.

Gaussian diffusion with an eps-predicting network and a learned variance range (Nichol & Dhariwal 2021).

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
"""A time grid: the number of steps -> that many timesteps of the training process, ascending from 0.

Raises:
    UserError: more steps than the grid has timesteps, or none.
"""


def cosine_betas(steps: int, cap: float = 0.999) -> np.ndarray:
    """beta_t = min(1 - abar(t+1)/abar(t), cap), abar(t) = cos^2((t/T + 0.008)/1.008 * pi/2). Float64 [steps]."""
    abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], cap)


def spaced(train_steps: int, steps: int) -> tuple[int, ...]:
    """``steps`` evenly spaced original timesteps, both ends included: round(i (T-1)/(n-1))."""
    require(1 <= steps <= train_steps, f"diffusion steps is {steps}; allowed: 1 to {train_steps}")
    if steps == 1:
        return (train_steps - 1,)
    return tuple(round(i * (train_steps - 1) / (steps - 1)) for i in range(steps))


def strided(train_steps: int, steps: int) -> tuple[int, ...]:
    """``steps`` original timesteps from 0 with one integer stride ("ddimN" of guided diffusion; Song et al. 2021)."""
    for stride in range(1, train_steps):
        if len(range(0, train_steps, stride)) == steps:
            return tuple(range(0, train_steps, stride))
    require(False, f"strided diffusion steps is {steps}; no integer stride over {train_steps} steps gives that many")
    raise AssertionError


@dataclass(frozen=True)
class Schedule:
    """One diffusion process. Arrays are float64 [S]; index 0 is the least noisy step.

    Attributes:
        timesteps: the original timesteps (0..T-1) of the S steps; what the network is told.
        betas: beta_i of this (possibly respaced) process.
    """

    timesteps: tuple[int, ...]
    betas: np.ndarray

    def __post_init__(self) -> None:
        require(len(self.timesteps) == len(self.betas), "a schedule needs one beta per timestep")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def abar(self) -> np.ndarray:
        """Cumulative products of 1 - beta."""
        return np.cumprod(1 - self.betas)

    @property
    def log_snr(self) -> np.ndarray:
        """log(abar / (1 - abar)), the log of the signal's share of the variance over the noise's; falls with the index."""
        abar = self.abar
        return np.log(abar) - np.log1p(-abar)

    def respace(self, timesteps: Sequence[int]) -> Schedule:
        """The process that visits only ``timesteps`` (ascending indices into this one), with the same marginals there."""
        abar = self.abar[list(timesteps)]
        previous = np.concatenate([[1.0], abar[:-1]])
        return Schedule(tuple(self.timesteps[t] for t in timesteps), 1 - abar / previous)


@lru_cache(maxsize=64)
def training_schedule(steps: int = TRAIN_STEPS) -> Schedule:
    """The process every diffusion head trains with: cosine, 1000 steps unless said otherwise."""
    return Schedule(tuple(range(steps)), cosine_betas(steps))


def uniform_t(steps: int, last: int = TRAIN_STEPS - 1) -> tuple[int, ...]:
    """The grid of ``steps`` timesteps evenly spaced from 0 to ``last``, both included."""
    return spaced(last + 1, steps)


def uniform_log_snr(steps: int, last: int = TRAIN_STEPS - 1) -> tuple[int, ...]:
    """The grid of ``steps`` timesteps from 0 to ``last``, evenly spaced in log-SNR (Lu et al. 2022).

    Timesteps are whole numbers. Near t = 0, where the log-SNR falls faster than even spacing asks, neighbours are taken; they are
    what makes the grid approach `uniform_t` as ``steps`` approaches ``last`` + 1.
    """
    require(1 <= steps <= last + 1, f"diffusion steps is {steps}; allowed: 1 to {last + 1}")
    if steps == 1:
        return (last,)
    log_snr, index = training_schedule().log_snr[: last + 1], np.arange(steps)
    even = np.linspace(log_snr[0], log_snr[last], steps)
    nearest = np.rint(np.interp(-even, -log_snr, np.arange(last + 1))).astype(int)
    # Distinct: each at least one above the one before it, and low enough to leave room for those after it.
    distinct = np.maximum.accumulate(nearest - index) + index
    return tuple(int(t) for t in np.minimum(distinct, last - index[::-1]))


@lru_cache(maxsize=256)
def sampling_schedule(steps: int, grid: Grid = uniform_t) -> Schedule:
    """The training process respaced to the ``steps`` timesteps of ``grid``."""
    return training_schedule().respace(grid(steps))


Prediction = Literal["epsilon", "v_prediction"]
"""What a network predicts."""
Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x_t -> (prediction, v)."""


@dataclass(frozen=True)
class Coefficients:
    """A schedule's coefficients as float32 tensors [S] on a device, rounded once from float64."""

    timesteps: Tensor  # int64, original timesteps
    sqrt_abar: Tensor
    sqrt_one_minus_abar: Tensor
    x0_from_x: Tensor  # sqrt(1/abar)
    x0_from_eps: Tensor  # sqrt(1/abar - 1)
    mean_from_x0: Tensor  # posterior mean = mean_from_x0 x0 + mean_from_x x
    mean_from_x: Tensor
    log_beta: Tensor  # the upper end of the variance range
    log_posterior_variance: Tensor  # the lower end, entry 0 replaced by entry 1 (it would be log 0)
    abar: Tensor
    abar_previous: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def coefficients(schedule: Schedule, device: torch.device | str = "cpu") -> Coefficients:
    """The coefficients of ``schedule`` on ``device``; computed once per pair."""
    return _coefficients(schedule.timesteps, schedule.betas.tobytes(), str(device))


@torch.compiler.assume_constant_result
def training_coefficients(device: torch.device) -> Coefficients:
    """The coefficients of the training process; to torch.compile a constant, where it would trace their computation."""
    return coefficients(training_schedule(), device)


@lru_cache(maxsize=256)
def _coefficients(timesteps: tuple[int, ...], betas_bytes: bytes, device: str) -> Coefficients:
    betas = np.frombuffer(betas_bytes)
    abar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], abar[:-1]])
    posterior = betas * (1 - previous) / (1 - abar)
    # With a single step there is no entry 1 to borrow; its own beta stands in.
    floor = posterior[1] if len(betas) > 1 else betas[0]

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32).to(device)

    return Coefficients(
        timesteps=torch.tensor(timesteps, device=device),
        sqrt_abar=put(np.sqrt(abar)),
        sqrt_one_minus_abar=put(np.sqrt(1 - abar)),
        x0_from_x=put(np.sqrt(1 / abar)),
        x0_from_eps=put(np.sqrt(1 / abar - 1)),
        mean_from_x0=put(betas * np.sqrt(previous) / (1 - abar)),
        mean_from_x=put((1 - previous) * np.sqrt(1 - betas) / (1 - abar)),
        log_beta=put(np.log(betas)),
        log_posterior_variance=put(np.log(np.append(floor, posterior[1:]))),
        abar=put(abar),
        abar_previous=put(previous),
    )


def _at(values: Tensor, i: Tensor | int) -> Tensor:
    """One coefficient per row as [M, 1], or a 0-d tensor for an index common to all rows."""
    return values[i] if isinstance(i, int) else values[i].unsqueeze(-1)


def add_noise(c: Coefficients, x0: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (paper, Section 3.2)."""
    return _at(c.sqrt_abar, i) * x0 + _at(c.sqrt_one_minus_abar, i) * eps


def predict_x0(c: Coefficients, x: Tensor, i: Tensor | int, eps: Tensor) -> Tensor:
    """x_0 as eps implies it; not clipped (latents have no range)."""
    return _at(c.x0_from_x, i) * x - _at(c.x0_from_eps, i) * eps


def posterior_mean(c: Coefficients, x0: Tensor, x: Tensor, i: Tensor | int) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0)."""
    return _at(c.mean_from_x0, i) * x0 + _at(c.mean_from_x, i) * x


def log_variance(c: Coefficients, v: Tensor, i: Tensor | int) -> Tensor:
    """Learned range: f log beta_t + (1 - f) log posterior variance, f = (v + 1)/2 (Nichol & Dhariwal 2021, Eq. 15)."""
    f = (v + 1) / 2
    return f * _at(c.log_beta, i) + (1 - f) * _at(c.log_posterior_variance, i)


def velocity(c: Coefficients, x0: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022)."""
    return _at(c.sqrt_abar, i) * eps - _at(c.sqrt_one_minus_abar, i) * x0


def eps_from_velocity(c: Coefficients, x: Tensor, i: Tensor | int, v: Tensor) -> Tensor:
    """eps as a velocity implies it: sqrt(abar_t) v + sqrt(1 - abar_t) x_t. Exact where t is high, whatever the network says."""
    return _at(c.sqrt_abar, i) * v + _at(c.sqrt_one_minus_abar, i) * x


def predicted_eps(prediction: Prediction, c: Coefficients, x: Tensor, i: Tensor | int, out: Tensor) -> Tensor:
    """eps, as what the network predicted implies it."""
    return out if prediction == "epsilon" else eps_from_velocity(c, x, i, out)


@dataclass(frozen=True)
class LossTerms:
    """The two terms of the loss, one value per row [M]: mse of the network's prediction, and vb in bits per dimension."""

    mse: Tensor
    vb: Tensor

    @property
    def total(self) -> Tensor:
        """What is trained: MSE + VB, unweighted."""
        return self.mse + self.vb


def loss_terms(network: Network, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
    """Both terms of the training process at given timesteps t [...] in 0..999 and noise [..., D]; x0 [..., D] is broadcast.

    Only the network sees autocast.
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
    """The variational bound that trains the variance alone: its gradient stops at eps. Bits per dimension, [M].

    Args:
        eps, v: the network's noise prediction and variance interpolation for x = add_noise(x0, i, noise).
        i: [M] step indices of the process ``c``.
    """
    truth = posterior_mean(c, x0, x, i)
    truth_log_variance = _at(c.log_posterior_variance, i)
    mean = posterior_mean(c, predict_x0(c, x, i, eps.detach()), x, i)
    logvar = log_variance(c, v, i)
    kl = 0.5 * (logvar - truth_log_variance - 1 + (truth_log_variance - logvar).exp() + (truth - mean).square() * (-logvar).exp())
    nll = -_discretized_log_likelihood(x0, mean, logvar / 2)
    return torch.where(i == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's CDF that image diffusion uses (kept so that numbers agree)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the 2/255-wide bin around x, edges open at +-0.999, floored at 1e-12 (Ho et al. 2020, Eq. 13)."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
