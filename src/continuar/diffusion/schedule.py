"""Noise schedules and their respacing, in float64 on the host.

1. `cosine_betas`: the training process of T steps (Nichol & Dhariwal 2021, Eq. 17).
2. A time grid, `uniform_t` or `uniform_log_snr`: which of the T steps a sampler visits (`spaced` and `strided` serve any T).
3. `Schedule.respace`: the coarser process that visits only those, from the ratios of the kept cumulative products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from continuar.errors import require

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
