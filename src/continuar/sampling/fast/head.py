"""The diffusion head's sampling loop, in which each diffusion step computes only what depends on x_t. Equal to
`DiffusionHead.draw`.

1. Once: C = condition(z), the embeddings E of all timesteps, and the noise of all steps, times the temperature and the constant
   part of its standard deviation.
2. Per stretch of steps: their modulations, Linear(SiLU(E[s] + C)), in one product. They do not depend on x_t, and with few rows
   most of a step would be spent on reading that Linear's weights. A memory budget limits the stretch; with many rows it is one
   step.
3. Per step: the network, whose two halves share the input, the first LayerNorm and the residual stream up to the first gate, then
   one update x <- a x + b (out_u + w (out_c - out_u)) + exp(c v) noise: the sampler's formulas with their constants multiplied in
   float64.

Only ancestral sampling (`ddpm`) has the update of step 3; other samplers run their own function on the same network.

In bfloat16, matrix products take bfloat16; the residual stream, the output layer, x and the noise stay float32.

G is 2 with guidance and 1 without, R rows, Z condition width, D token dim, W width, S diffusion steps, M = (3 depth + 2) W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.diffusion.gaussian import Schedule, coefficients, eps_from_velocity
from continuar.diffusion.samplers import SAMPLERS
from continuar.heads.diffusion import DenoisingMLP, DiffusionHead, DiffusionOptions, Prediction
from continuar.noise import KeyedNoise, Purpose, RowNoise
from continuar.sampling.fast.kernels import Kernels, Step

CPU_ROWS = 512
"""Rows of one product of modulations on a CPU: enough for full speed, few enough to stay in the cache."""
GPU_BYTES = 64 * 2**20
"""Bytes of the modulations of one stretch on a GPU; a stretch has at least one step."""


@dataclass(frozen=True)
class AncestralUpdate:
    """Constants of one ancestral step: x <- a x + b out + exp(c v) spread noise, with the network's guided output and its v."""

    a: float
    b: float
    c: float
    spread: float


def ancestral_updates(schedule: Schedule, prediction: Prediction) -> tuple[AncestralUpdate, ...]:
    """The sampler `ddpm` with its constants multiplied in float64; index 0 is the least noisy step.

    With x0 = x / sqrt(abar) - sqrt(1/abar - 1) eps and the posterior mean m0 x0 + m1 x: a = m0 / sqrt(abar) + m1 and
    b = -m0 sqrt(1/abar - 1). A velocity gives eps = sqrt(abar) v + sqrt(1 - abar) x. The standard deviation is
    exp((f log beta + (1 - f) log lower) / 2) with f = (v + 1)/2: exp(c v) times a constant.
    """
    betas, abar = schedule.betas, schedule.abar
    previous = np.concatenate([[1.0], abar[:-1]])
    m0, m1 = betas * np.sqrt(previous) / (1 - abar), (1 - previous) * np.sqrt(1 - betas) / (1 - abar)
    a, b = m0 / np.sqrt(abar) + m1, -m0 * np.sqrt(1 / abar - 1)
    if prediction == "v_prediction":
        a, b = a + b * np.sqrt(1 - abar), b * np.sqrt(abar)
    lower = betas * (1 - previous) / (1 - abar)
    # The posterior variance of step 0 is 0, whose logarithm does not exist; as in the authors' code, step 1's takes its place.
    lower[0] = lower[1] if len(betas) > 1 else betas[0]
    log_beta, log_lower = np.log(betas), np.log(lower)
    c, spread = (log_beta - log_lower) / 4, np.exp((log_beta + log_lower) / 4)
    spread[0] = 0  # the last step adds no noise
    return tuple(AncestralUpdate(*map(float, values)) for values in zip(a, b, c, spread, strict=True))


class FastDiffusion:
    """Draws tokens as `DiffusionHead.draw` does, without host synchronisation, so that it can be captured.

    Args:
        exact: the head in float32.
        fast: the same head with the engine's weights.
        kernels: the fused operations or the plain ones.
    """

    def __init__(self, exact: DiffusionHead, fast: DiffusionHead, options: DiffusionOptions, kernels: Kernels) -> None:
        self.exact, self.net, self.options, self.kernels = exact.net, fast.net, options, kernels
        self.prediction, self.token_dim = cast(Prediction, exact.prediction), exact.token_dim
        self.sampler = SAMPLERS[options.sampler]
        self.schedule = self.sampler.schedule(options.diffusion_steps)
        self.updates = ancestral_updates(self.schedule, self.prediction)
        # Kept alive here, because a captured graph reads them at their addresses.
        device = self.net.modulation.weight.device
        self._coefficients = coefficients(self.schedule, device)
        self._spread_S = torch.tensor([u.spread for u in self.updates], device=device)
        self.dtype = self.net.modulation.weight.dtype
        # The first step (the noisiest) of an epsilon network stays float32: at 100 steps it multiplies errors by 300, the second by
        # 1.3.
        self.exact_steps = 1 if self.dtype != torch.float32 and self.prediction == "epsilon" else 0

    def draw(self, z_GRZ: Tensor, scale: Tensor, temperature: Tensor, noise: RowNoise) -> Tensor:
        """Tokens [R, D] float32 for z [G, R, Z] float32: the conditional half, then with guidance the unconditional one."""
        c = self._coefficients
        time_SW = self.exact.time_embedding(c.timesteps)
        condition_GRW = self.exact.condition(z_GRZ.to(self.exact.condition.weight.dtype))
        modulations = _Modulations(self, time_SW, condition_GRW)
        x = self._normals(noise, Purpose.INITIAL, 1)[0]
        if self.options.sampler == "ddpm":
            return self._ancestral(x, modulations, scale, temperature, noise)

        def denoise(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            out, v = self._network(i, x, modulations).chunk(2, dim=-1)
            out = out[0] if len(out) == 1 else torch.lerp(out[1], out[0], scale)
            return out if self.prediction == "epsilon" else eps_from_velocity(c, x, i, out), v[0]

        # A sampler passes each step's timestep to the network. Modulations are found by the step's index, so it gets that instead.
        indexed = replace(c, timesteps=cast(Tensor, range(len(c))))
        return self.sampler.run(
            cast(Callable[..., Any], denoise),
            x,
            indexed,
            temperature=temperature,
            step_noise=lambda i: noise.normal(Purpose.STEP, i, self.token_dim),
        )

    def _ancestral(self, x: Tensor, modulations: _Modulations, scale: Tensor, temperature: Tensor, noise: RowNoise) -> Tensor:
        noise_SRD = self._normals(noise, Purpose.STEP, len(self.updates))
        noise_SRD = noise_SRD * (temperature * self._spread_S).view(-1, 1, 1)
        small, h = modulations.rows <= self.kernels.few_rows, None
        for i in reversed(range(len(self.updates))):
            u = self.updates[i]
            step = Step(scale, noise_SRD[i], u.a, u.b, u.c)
            if small and not self.is_exact(i):
                h = self.exact.input(x).unsqueeze(0) if h is None else h
                x, h = self.kernels.small_step(self.net, self.exact, x, h, modulations.at(i, self.net), step)
            else:
                x = self.kernels.update(x, self._network(i, x, modulations), step)
        return x

    def _normals(self, noise: RowNoise, purpose: Purpose, steps: int) -> Tensor:
        """Standard normal [steps, R, D]."""
        if isinstance(noise, KeyedNoise):
            return self.kernels.normals(noise, purpose, steps, self.token_dim)
        # Recorded noise holds only the draws that a sampler asks for, and `ddpm` draws none in step 0 of several.
        draws = [noise.normal(purpose, i, self.token_dim) for i in range(steps > 1, steps)]
        return torch.stack(draws if steps == 1 else [torch.zeros_like(draws[0]), *draws])

    def _network(self, i: int, x_RD: Tensor, modulations: _Modulations) -> Tensor:
        """Outputs [G, R, 2 D] float32 at step i."""
        net = self.exact if self.is_exact(i) else self.net
        return self.kernels.denoise(net, self.exact, self.exact.input(x_RD).unsqueeze(0), modulations.at(i, net))

    def is_exact(self, i: int) -> bool:
        """True if step i runs in float32 whatever the engine's precision."""
        return i >= len(self.updates) - self.exact_steps


class _Modulations:
    """Modulations [G, R, M] of all steps, computed a stretch of steps at a time; asked for from the last step to the first."""

    def __init__(self, head: FastDiffusion, time_SW: Tensor, condition_GRW: Tensor) -> None:
        self._head, self._time, self._condition = head, time_SW, condition_GRW
        self.rows, net = condition_GRW.shape[0] * condition_GRW.shape[1], head.net
        size = self.rows * (3 * net.depth + 2) * net.width * head.dtype.itemsize
        self._length = max(1, CPU_ROWS // self.rows if time_SW.device.type == "cpu" else GPU_BYTES // size)
        self._first = len(time_SW)

    def at(self, i: int, net: DenoisingMLP) -> Tensor:
        if self._head.is_exact(i):
            return self._compute(net, i, i + 1)[0]
        if i < self._first:
            self._first = max(0, i + 1 - self._length)
            self._stretch = self._compute(net, self._first, i + 1)
        return self._stretch[i - self._first]

    def _compute(self, net: DenoisingMLP, first: int, end: int) -> Tensor:
        y = F.silu(self._time[first:end, None, None] + self._condition)
        return net.modulation(y.to(net.modulation.weight.dtype))
