"""Ancestral sampling (Ho et al. 2020; paper, Eq. 2) with a learned variance and the paper's temperature.

For i = S-1 .. 0:
1. eps, v = denoise(x, timestep_i)
2. x0 = predict_x0(x, eps)
3. x = posterior_mean(x0, x) + tau exp(log_variance / 2) noise, without the noise at i = 0

Deterministic DDIM (Song et al. 2021, Eq. 12 with eta = 0).

For i = S-1 .. 0:
1. eps = denoise(x, timestep_i)
2. x0 = predict_x0(x, eps)
3. x = sqrt(abar_{i-1}) x0 + sqrt(1 - abar_{i-1}) eps

Its grid ends at t = 979, as that of `dpmpp_2m`, whose module says why.

It adds no noise, so it has no temperature: any value but 1 is refused where the options are made.

DPM-Solver++, multistep, second order (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma) and h_i = lambda_{i-1} - lambda_i, for i = S-1 .. 0:
1. eps = denoise(x, timestep_i)
2. m_i = predict_x0(x, eps)
3. d = m_i + h_i / (2 h_{i+1}) (m_i - m_{i+1}): x_0 extrapolated to the middle of the step; at the first step d = m_i
4. x = sigma_{i-1} / sigma_i x + alpha_{i-1} (1 - exp(-h_i)) d; at i = 0, where sigma_{i-1} is 0, x = m_0

With d = m_i everywhere this is DDIM; step 3 makes its error fall with the square of the number of steps.

**Why it starts below t = 980.** m = x / alpha - eps sigma / alpha multiplies an error of eps by sigma / alpha, which in the cosine
schedule is 20,291 at t = 999 and 32 at t = 979. For a standard normal target, an error of 1 in the first eps of 20 moves the sample
by 28 on the log-SNR grid that ends at 999 (DDIM on its own grid: by 1574) and by 0.08 on the one that ends at 979. The price:
x_T ~ N(0, I) stands in for x_979, whose mean is sqrt(abar_979) = 0.031 times that of x_0.

It adds no noise, so it has no temperature: any value but 1 is refused where the options are made.

DPM-Solver++ of the stochastic equation, multistep, second order (Lu et al. 2022, arXiv 2211.01095, SDE-DPM-Solver++(2M)).

With alpha, sigma, lambda, h_i and the extrapolated x_0 d as in `dpmpp_2m`, for i = S-1 .. 0:
    x = sigma_{i-1} / sigma_i exp(-h_i) x + alpha_{i-1} (1 - exp(-2 h_i)) d + tau sigma_{i-1} sqrt(1 - exp(-2 h_i)) noise,
and x = m_0 at i = 0, where sigma_{i-1} is 0.

A step forgets part of its past, the errors of earlier steps with it, where `dpmpp_2m` carries them along. Of a Gaussian, 20
steps make
one whose variance is 6% too large, 40 steps 1.6% (`dpmpp_2m`: 2.3%, 0.6%). Its grid ends at t = 979, as that of `dpmpp_2m`,
whose module
says why.

Samplers: pure functions from x_T to x_0. Each is one file; `SAMPLERS` is the closed table of their names.

A sampler's steps and its time grid are separate (`schedule.Grid`); the table says which grid a name goes with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from continuar.diffusion.gaussian import (
    Coefficients,
    Grid,
    Schedule,
    log_variance,
    posterior_mean,
    predict_x0,
    sampling_schedule,
    uniform_log_snr,
    uniform_t,
)
from continuar.errors import UserError, require


def ddpm(
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    c: Coefficients,
    *,
    temperature: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Ancestral sampling; see `Sampler` for the arguments."""
    for i in reversed(range(len(c))):
        eps, v = denoise(x, c.timesteps[i])
        mean = posterior_mean(c, predict_x0(c, x, i, eps), x, i)
        x = mean if i == 0 else mean + temperature * (0.5 * log_variance(c, v, i)).exp() * step_noise(i)
    return x


def ddim(
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    c: Coefficients,
    *,
    temperature: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Deterministic sampling; see `Sampler`. ``temperature`` and ``step_noise`` have nothing to act on."""
    for i in reversed(range(len(c))):
        eps, _ = denoise(x, c.timesteps[i])
        x0 = predict_x0(c, x, i, eps)
        previous = c.abar_previous[i]
        x = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
    return x


LAST = 979
"""The timestep of x_T; the module's docstring says why."""


def dpmpp_2m(
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    c: Coefficients,
    *,
    temperature: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Deterministic sampling; see `Sampler`. ``temperature`` and ``step_noise`` have nothing to act on."""
    (h, slope), alpha, sigma = log_snr_steps(c), c.sqrt_abar, c.sqrt_one_minus_abar
    keep, gain = sigma[:-1] / sigma[1:], -alpha[:-1] * (-h).expm1()
    later = None
    for i in reversed(range(len(c))):
        eps, _ = denoise(x, c.timesteps[i])
        x0 = predict_x0(c, x, i, eps)
        if i == 0:
            return x0
        d = x0 if later is None else x0 + slope[i - 1] * (x0 - later)
        x, later = keep[i - 1] * x + gain[i - 1] * d, x0
    return x


def log_snr_steps(c: Coefficients) -> tuple[Tensor, Tensor]:
    """(h_i, h_i / (2 h_{i+1})), [S-1] and [S-2]; entry i - 1 belongs to step i, as h_i goes from i to i - 1."""
    lambda_ = c.sqrt_abar.log() - c.sqrt_one_minus_abar.log()
    h = lambda_[:-1] - lambda_[1:]
    return h, h[:-1] / (2 * h[1:])


def dpmpp_2m_sde(
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    c: Coefficients,
    *,
    temperature: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Stochastic sampling of second order; see `Sampler` for the arguments."""
    (h, slope), alpha, sigma = log_snr_steps(c), c.sqrt_abar, c.sqrt_one_minus_abar
    fresh = -(-2 * h).expm1()
    keep, gain, spread = sigma[:-1] / sigma[1:] * (-h).exp(), alpha[:-1] * fresh, sigma[:-1] * fresh.sqrt()
    later = None
    for i in reversed(range(len(c))):
        eps, _ = denoise(x, c.timesteps[i])
        x0 = predict_x0(c, x, i, eps)
        if i == 0:
            return x0
        d = x0 if later is None else x0 + slope[i - 1] * (x0 - later)
        x, later = keep[i - 1] * x + gain[i - 1] * d + temperature * spread[i - 1] * step_noise(i), x0
    return x


SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"]


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
    "dpmpp_2m": SamplerEntry(dpmpp_2m, partial(uniform_log_snr, last=LAST), has_temperature=False),
    "dpmpp_2m_sde": SamplerEntry(dpmpp_2m_sde, partial(uniform_log_snr, last=LAST), has_temperature=True),
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
