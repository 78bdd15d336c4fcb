"""Deterministic DDIM (Song et al. 2021, Eq. 12 with eta = 0).

For i = S-1 .. 0:
1. eps = denoise(x, timestep_i)
2. x0 = predict_x0(x, eps)
3. x = sqrt(abar_{i-1}) x0 + sqrt(1 - abar_{i-1}) eps

Its grid ends at t = 979, as that of `dpmpp`, whose module says why.

It adds no noise, so it has no temperature: any value but 1 is refused where the options are made.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from continuar.diffusion.process import Coefficients, predict_x0


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
