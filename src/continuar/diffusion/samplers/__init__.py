"""Samplers: pure functions from x_T to x_0. Each is one file; `SAMPLERS` is the closed table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from continuar.diffusion.process import Coefficients
from continuar.diffusion.samplers.ddim import ddim
from continuar.diffusion.samplers.ddpm import ddpm

SamplerName = Literal["ddpm", "ddim"]


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


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim}
