"""DPM-Solver++ of the stochastic equation, multistep, second order (Lu et al. 2022, arXiv 2211.01095, SDE-DPM-Solver++(2M)).

With alpha, sigma, lambda, h_i and the extrapolated x_0 d as in `dpmpp`, for i = S-1 .. 0:
    x = sigma_{i-1} / sigma_i exp(-h_i) x + alpha_{i-1} (1 - exp(-2 h_i)) d + tau sigma_{i-1} sqrt(1 - exp(-2 h_i)) noise,
and x = m_0 at i = 0, where sigma_{i-1} is 0.

A step forgets part of its past, the errors of earlier steps with it, where `dpmpp` carries them along. Of a Gaussian, 20 steps make
one whose variance is 6% too large, 40 steps 1.6% (`dpmpp`: 2.3%, 0.6%). Its grid ends at t = 979, as that of `dpmpp`, whose module
says why.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from continuar.diffusion.process import Coefficients, predict_x0
from continuar.diffusion.samplers.dpmpp import log_snr_steps


def dpmpp_sde(
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
