"""Samplers: pure functions from x_T to x_0. Each is one file; `SAMPLERS` is the closed table of their names.

A sampler's steps and its time grid are separate (`schedule.Grid`); the table says which grid a name goes with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from continuar.diffusion.process import Coefficients
from continuar.diffusion.samplers.ddim import ddim
from continuar.diffusion.samplers.ddpm import ddpm
from continuar.diffusion.samplers.dpmpp import LAST, dpmpp
from continuar.diffusion.samplers.dpmpp_sde import dpmpp_sde
from continuar.diffusion.schedule import Grid, Schedule, sampling_schedule, uniform_log_snr, uniform_t
from continuar.errors import UserError, require

SamplerName = Literal["ddpm", "ddim", "dpmpp", "dpmpp-sde"]


class Sampler(Protocol):
    """``denoise(x, timestep) -> (eps, v)``, both [M, D], with the original timestep as a 0-d int64 tensor.

    Args:
        denoise: the (possibly guided) network.
        x: x_T, [M, D] float32.
        c: coefficients of the process to visit, least noisy first.
        temperature: a 0-d tensor; scales the noise that steps add, never x_T (paper, Section 3.2).
        step_noise: step index -> [M, D] standard normal.
    """

    def __call__(
        self,
        denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        c: Coefficients,
        *,
        temperature: Tensor,
        step_noise: Callable[[int], Tensor],
    ) -> Tensor: ...


@dataclass(frozen=True)
class SamplerEntry:
    """What a sampler's name stands for.

    Attributes:
        run: its steps.
        grid: the timesteps they visit.
        has_temperature: whether steps add noise, which is what a temperature scales.
    """

    run: Sampler
    grid: Grid
    has_temperature: bool

    def schedule(self, steps: int) -> Schedule:
        """The process of ``steps`` steps that it visits.

        Raises:
            UserError: a number of steps that its grid does not have.
        """
        return sampling_schedule(steps, self.grid)


SAMPLERS: dict[str, SamplerEntry] = {
    "ddpm": SamplerEntry(ddpm, uniform_t, has_temperature=True),
    "ddim": SamplerEntry(ddim, partial(uniform_t, last=LAST), has_temperature=False),
    "dpmpp": SamplerEntry(dpmpp, partial(uniform_log_snr, last=LAST), has_temperature=False),
    "dpmpp-sde": SamplerEntry(dpmpp_sde, partial(uniform_log_snr, last=LAST), has_temperature=True),
}


def check_sampler(name: str, steps: int) -> None:
    """Refuses a name that is not in the table, and a number of steps that its grid does not have."""
    require(name in SAMPLERS, f"sampler is '{name}'; allowed: {', '.join(SAMPLERS)}")
    try:
        SAMPLERS[name].schedule(steps)
    except UserError as problem:
        raise UserError(f"{problem} with the sampler '{name}'") from None


def check_temperature(name: str, temperature: float) -> None:
    """Refuses a temperature with a sampler that adds no noise."""
    noisy = " or ".join(other for other, entry in SAMPLERS.items() if entry.has_temperature)
    require(
        SAMPLERS[name].has_temperature or temperature == 1.0,
        f"temperature is {temperature} with the sampler '{name}', which adds no noise; allowed: 1.0, or the sampler {noisy}",
    )
