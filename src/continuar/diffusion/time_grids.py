"""Time grids besides `gaussian.uniform_t`: the timesteps of the training process that a sampler visits."""

from __future__ import annotations

import numpy as np

from continuar.diffusion.gaussian import TRAIN_STEPS, training_schedule
from continuar.errors import UserError, require


def uniform_log_snr(steps: int, last: int = TRAIN_STEPS - 1) -> tuple[int, ...]:
    """The grid of ``steps`` timesteps from 0 to ``last``, evenly spaced in log-SNR (Lu et al. 2022).

    Near t = 0 the log-SNR falls faster than even spacing asks, and timesteps are integers: there the grid takes neighbours. They
    make it approach `uniform_t` as ``steps`` approaches ``last`` + 1.
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


def strided(steps: int) -> tuple[int, ...]:
    """The grid of ``steps`` timesteps from 0 with one integer stride ("ddimN" of guided diffusion; Song et al. 2021)."""
    for stride in range(1, TRAIN_STEPS):
        if len(grid := range(0, TRAIN_STEPS, stride)) == steps:
            return tuple(grid)
    raise UserError(f"strided diffusion steps is {steps}; no integer stride over {TRAIN_STEPS} steps gives that many")
