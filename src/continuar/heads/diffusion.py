"""The diffusion head: p(x | z) by a small denoising network (paper, Sections 3.2 and 3.3).

Usable alone, for any vectors x that depend on any condition z: ``head.loss(z, x)`` and ``head.sample(z)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from continuar.diffusion.process import (
    LossTerms,
    add_noise,
    coefficients,
    eps_from_velocity,
    training_coefficients,
    variational_bound,
    velocity,
)
from continuar.diffusion.samplers import SAMPLERS, SamplerName, check_temperature
from continuar.diffusion.schedule import TRAIN_STEPS
from continuar.errors import require
from continuar.guidance import Guidance, check_scale
from continuar.heads.base import Head, HeadOptions, HeadSample
from continuar.heads.mlp import DenoisingMLP
from continuar.noise import GeneratorNoise, Purpose, RowNoise
from continuar.precision import without_autocast

Prediction = Literal["eps", "velocity"]


@dataclass(frozen=True)
class DiffusionHeadConfig:
    """The diffusion head. Paper: width 1024, 3 blocks (Table 3); B 6 x 1024, L 8 x 1280, H 12 x 1536 (Table 4)."""

    kind: Literal["diffusion"] = "diffusion"
    width: int = 1024
    """W of the denoising MLP."""
    depth: int = 3
    """Residual blocks of the denoising MLP."""
    timesteps_per_token: int = 4
    """Noise levels drawn per token and training step (paper, Section 3.2: 4)."""
    prediction: Prediction = "eps"
    """What the network predicts: "eps" as the paper's, or "velocity" (Salimans & Ho 2022), which small or short-trained heads need:
    sampling multiplies an error of eps at t = 999 by 300 and more, and a velocity has none there."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "timesteps_per_token"):
            require(getattr(self, name) >= 1, f"head.{name} is {getattr(self, name)}; allowed: 1 or more")
        require(self.prediction in ("eps", "velocity"), f"head.prediction is '{self.prediction}'; allowed: eps, velocity")

    def build(self, token_dim: int, cond_dim: int) -> DiffusionHead:
        """The head for tokens of ``token_dim`` and condition vectors of ``cond_dim``."""
        return DiffusionHead(
            token_dim,
            cond_dim,
            width=self.width,
            depth=self.depth,
            timesteps_per_token=self.timesteps_per_token,
            prediction=self.prediction,
        )


class DiffusionHead(Head):
    """Diffusion loss and sampler for one token given z.

    Args:
        token_dim: D, the size of x.
        cond_dim: Z, the size of the condition vector.
        width, depth: of the denoising MLP.
        timesteps_per_token: draws of (t, noise) per row in `loss`.
        prediction: "eps" or "velocity"; see `DiffusionHeadConfig`.
    """

    def __init__(
        self,
        token_dim: int,
        cond_dim: int,
        width: int = 1024,
        depth: int = 3,
        timesteps_per_token: int = 4,
        prediction: Prediction = "eps",
    ) -> None:
        super().__init__()
        for name, value in (("token_dim", token_dim), ("cond_dim", cond_dim), ("width", width), ("depth", depth)):
            require(value >= 1, f"{name} is {value}; allowed: 1 or more")
        self.token_dim, self.cond_dim, self.timesteps_per_token = token_dim, cond_dim, timesteps_per_token
        require(prediction in ("eps", "velocity"), f"prediction is '{prediction}'; allowed: eps, velocity")
        self.prediction = prediction
        self.net = DenoisingMLP(token_dim, cond_dim, width, depth)

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """The diffusion loss (paper, Eq. 1, plus the variance's bound): [M] for z [M, Z] and target x [M, D].

        x is expected at about unit standard deviation: the noise schedule assumes it.
        """
        require(
            target.shape == (*z.shape[:-1], self.token_dim) and z.shape[-1] == self.cond_dim,
            f"z is {tuple(z.shape)} and x {tuple(target.shape)}; allowed: [M, {self.cond_dim}] and [M, {self.token_dim}]",
        )
        k = self.timesteps_per_token
        t = torch.randint(TRAIN_STEPS, (k, *z.shape[:-1]), device=z.device)
        noise = torch.randn(k, *target.shape, device=z.device)
        return self.loss_terms(z.expand(k, *z.shape), target.expand(k, *target.shape), t, noise).total.mean(0)

    def loss_terms(self, z: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """Both terms for given timesteps t [...] in 0..999 and noise [..., D]; z [..., Z], x0 [..., D]."""
        c = training_coefficients(z.device)
        x0, noise = x0.float(), noise.float()
        with without_autocast(z):
            x = add_noise(c, x0, t, noise)
        out, v = self.net(x, t, z)
        with without_autocast(z):
            out, target = out.float(), noise if self.prediction == "eps" else velocity(c, x0, t, noise)
            eps = out if self.prediction == "eps" else eps_from_velocity(c, x, t, out)
            return LossTerms((target - out).square().mean(-1), variational_bound(c, eps, v.float(), x0, x, t))

    def draw(
        self, z: Tensor, *, options: HeadOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        sampler = SAMPLERS[options.sampler]
        c = coefficients(sampler.schedule(options.diffusion_steps), z.device)
        with without_autocast(z):
            denoise = self._guided(z.float(), guidance)
            x = noise.normal(Purpose.INITIAL, 0, self.token_dim)
            x = sampler.run(
                denoise,
                x,
                c,
                temperature=temperature,
                step_noise=lambda i: noise.normal(Purpose.STEP, i, self.token_dim),
            )
        return HeadSample(x)

    def _guided(self, z: Tensor, guidance: Guidance | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """denoise(x, t) -> (eps, v) with z's share of the condition computed once; with guidance, eps_u + w (eps_c - eps_u).

        Both halves see the same x_t; the variance is the conditional half's (paper, Section 4; Appendix B).
        """
        net, c = self.net, training_coefficients(z.device)

        def evaluate(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out, v = net.denoise(x, net.modulate(net.time_embedding(t) + y))
            # t is 0-d: one timestep for all rows.
            return out if self.prediction == "eps" else eps_from_velocity(c, x, t[None], out), v

        if guidance is None:
            y = net.condition(z)
            return lambda x, t: evaluate(x, t, y)
        y = net.condition(torch.cat((z, guidance.z_uncond.float())))

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            eps, v = evaluate(torch.cat((x, x)), t, y)
            eps_cond, eps_uncond = eps.chunk(2)
            return eps_uncond + guidance.scale * (eps_cond - eps_uncond), v[: len(x)]

        return denoise

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        *,
        diffusion_steps: int = 100,
        temperature: float = 1.0,
        sampler: SamplerName = "ddpm",
        z_uncond: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws one x [M, D] for each row of z [M, Z].

        Args:
            diffusion_steps: 1..1000 (980 with "dpmpp"); 100 suffice (paper, Figure 4).
            temperature: >= 0; scales the noise added per step, lower is less diverse (paper, Figure 5). "ddpm" only.
            z_uncond, guidance: unconditional vectors [M, Z] and the scale of classifier-free guidance (1: none).
            generator: torch's default generator if None.
        """
        require(z.ndim == 2 and z.shape[1] == self.cond_dim, f"z is {tuple(z.shape)}; allowed: [M, {self.cond_dim}]")
        options = HeadOptions(diffusion_steps, sampler)
        check_scale("temperature", temperature)
        check_temperature(sampler, temperature)
        check_scale("guidance", guidance)
        guide = None
        if z_uncond is not None:
            require(z_uncond.shape == z.shape, f"z_uncond is {tuple(z_uncond.shape)}; allowed: {tuple(z.shape)}")
            guide = Guidance(z_uncond, torch.tensor(guidance, device=z.device))
        else:
            require(guidance == 1.0, f"guidance is {guidance} without z_uncond; allowed: 1.0, or give z_uncond")
        return self.draw(
            z,
            options=options,
            temperature=torch.tensor(temperature, device=z.device),
            noise=GeneratorNoise(len(z), z.device, generator),
            guidance=guide,
        ).tokens
