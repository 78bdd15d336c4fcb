"""Ancestral sampling (Ho et al. 2020; paper, Eq. 2) with a learned variance and the paper's temperature.

For i = S-1 .. 0:
1. eps, v = denoise(x, timestep_i)
2. x0 = predict_x0(x, eps)
3. x = posterior_mean(x0, x) + tau exp(log_variance / 2) noise, without the noise at i = 0
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from continuar.diffusion.process import Coefficients, log_variance, posterior_mean, predict_x0


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
