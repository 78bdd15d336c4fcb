"""The diffusion head: p(x | z) by a small denoising network (paper, Sections 3.2, 3.3 and 4.1).

1. `DenoisingMLP`: (x_t, t, z) -> eps and the variance's v. Residual blocks whose LayerNorms are modulated by t and z (adaLN-zero).
2. `DiffusionHead.forward`: the diffusion loss (Eq. 1) at several random timesteps per token.
3. `DiffusionHead.draw`: a sampler (Eq. 2) run on the network; classifier-free guidance acts on eps (`guided`).

The head works without the rest, for any vectors x that depend on any condition z: ``head.loss(z, x)`` and ``head.sample(z)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.diffusion.gaussian import (
    TRAIN_STEPS,
    LossTerms,
    Prediction,
    coefficients,
    loss_terms,
    predicted_eps,
    training_coefficients,
)
from continuar.diffusion.samplers import SAMPLERS, Denoise, SamplerName, check_sampler, check_temperature
from continuar.errors import check_sizes, require
from continuar.heads.base import Guidance, Head, HeadSample, HeadTraits, Options
from continuar.noise import Purpose, RowNoise
from continuar.tensors import add_loss_by_quarter, check_rows, without_autocast

LN_EPS = 1e-6
TIME_FEATURES = 256


def timestep_features(t: Tensor, features: int = TIME_FEATURES, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features, cosines first, frequencies max_period^(-i/(features/2)). [...] -> [..., features] float32."""
    half = features // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


class ResidualBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        # Autocast gives LayerNorm's output in float32. The Linear rounds it in any case; rounding first saves memory traffic.
        return x + gate * self.mlp(torch.addcmul(shift, self.norm(x).to(shift.dtype), 1 + scale))


class DenoisingMLP(nn.Module):
    """(x_t, t, z) -> vectors of the size of x: eps and v for a diffusion, the velocity for a flow.

    All adaLN projections are one Linear: they share their input SiLU(y), so one matrix product serves every block. Its rows are
    (shift, scale, gate) of block 0, 1, ..., then (shift, scale) of the final layer.

    Args:
        token_dim: D. cond_dim: Z. width: W. depth: blocks. outputs: number of vectors [M, D] in the output.
    """

    def __init__(self, token_dim: int, cond_dim: int, width: int, depth: int, outputs: int = 2) -> None:
        super().__init__()
        self.token_dim, self.width, self.depth, self.outputs = token_dim, width, depth, outputs
        self.input = nn.Linear(token_dim, width)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(cond_dim, width)
        self.modulation = nn.Linear(width, (3 * depth + 2) * width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.output = nn.Linear(width, outputs * token_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier Linears, N(0, 0.02) time MLP, zeros for adaLN and the output: every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.time:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.output.weight)

    def time_embedding(self, t: Tensor) -> Tensor:
        """[...] timesteps 0 to 1000 -> [..., W]."""
        # In float32: t = 999 is 1000 in bfloat16.
        with without_autocast(t):
            return self.time(timestep_features(t).to(self.input.weight.dtype))

    def modulate(self, y: Tensor) -> tuple[Tensor, ...]:
        """The 3 depth + 2 shifts, scales and gates [M, W] for y = time_embedding(t) + condition(z)."""
        return self.modulation(F.silu(y)).chunk(3 * self.depth + 2, dim=-1)

    def denoise(self, x: Tensor, modulations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """x_t [M, D] and its modulations -> the outputs, [M, D] each."""
        h = self.input(x)
        for i, block in enumerate(self.blocks):
            h = block(h, *modulations[3 * i : 3 * i + 3])
        shift, scale = modulations[-2:]
        # In float32: at high t samplers multiply an error of eps by 300 and more.
        with without_autocast(h):
            h = h.to(self.output.weight.dtype)
            h = torch.addcmul(shift.to(h.dtype), F.layer_norm(h, (self.width,), eps=LN_EPS), 1 + scale.to(h.dtype))
            return self.output(h).chunk(self.outputs, dim=-1)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """(x_t [..., D], t [...] or 0-d, z [..., Z]) -> the outputs, [..., D] each; leading dimensions are broadcast.

        t: int64 timesteps 0..999, or times of about 0..1000 as floats.
        """
        condition = self.condition(z)
        if t.is_floating_point() or t.numel() <= TRAIN_STEPS:
            time = self.time_embedding(t)
        else:
            # With more rows than timesteps, embed each timestep once.
            time = F.embedding(t, self.time_embedding(torch.arange(TRAIN_STEPS, device=t.device)))
        return self.denoise(x, self.modulate(time.to(condition.dtype) + condition))


@dataclass(frozen=True)
class DiffusionOptions(Options):
    """How to denoise a token. The temperature scales the noise that steps add."""

    kind: Literal["diffusion"] = "diffusion"
    diffusion_steps: int = 100
    """Denoising steps per token, 1 to 1000 with "ddpm", to 980 with the others; 100 suffice (paper, Figure 4)."""
    sampler: SamplerName = "ddpm"
    """"ddpm" is the paper's. "ddim" and "dpmpp_2m" are deterministic given x_T and have no temperature; "dpmpp_2m" needs the
    fewest steps. "dpmpp_2m_sde" is its stochastic form."""

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.diffusion_steps)

    def check_temperature(self, temperature: float) -> None:
        check_temperature(self.sampler, temperature)


@dataclass(frozen=True)
class DiffusionHeadConfig(HeadTraits):
    """The diffusion head. Paper: width 1024, 3 blocks (Table 3); B 6 x 1024, L 8 x 1280, H 12 x 1536 (Table 4)."""

    kind: Literal["diffusion"] = "diffusion"
    width: int = 1024
    """Width of the denoising MLP."""
    depth: int = 3
    """Residual blocks of the denoising MLP."""
    diffusion_batch_mul: int = 4
    """Noise levels drawn per token and training step (paper: 4)."""
    prediction: Prediction = "epsilon"
    """"epsilon" (paper), or "v_prediction" (Salimans & Ho 2022) for small or short-trained heads: sampling multiplies an error of
    epsilon at t = 999 by 300 and more, an error of v by at most 1."""

    def __post_init__(self) -> None:
        check_sizes("head.", width=self.width, depth=self.depth, diffusion_batch_mul=self.diffusion_batch_mul)
        check_prediction("head.prediction", self.prediction)

    def options(self) -> DiffusionOptions:
        return DiffusionOptions()

    def build(self, token_size: int, cond_dim: int) -> DiffusionHead:
        return DiffusionHead(token_size, cond_dim, self.width, self.depth, self.diffusion_batch_mul, self.prediction)


def check_prediction(name: str, prediction: str) -> None:
    """Refuses a prediction that is not in `Prediction`."""
    allowed = ("epsilon", "v_prediction")
    require(prediction in allowed, f"{name} is '{prediction}'; allowed: {', '.join(allowed)}")


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance, u + w (c - u) (Ho & Salimans 2022; paper, Section 4). Scale 1 is none, 0 unconditional."""
    return unconditional + scale * (conditional - unconditional)


class DiffusionHead(Head):
    """Diffusion loss and sampler for one token given z.

    Args:
        token_dim: D, the size of x.
        cond_dim: Z, the size of the condition vector.
        width, depth: of the denoising MLP.
        diffusion_batch_mul: draws of (t, noise) per row in the loss.
        prediction: "epsilon" or "v_prediction"; see `DiffusionHeadConfig`.
    """

    options_type = DiffusionOptions

    def __init__(
        self,
        token_dim: int,
        cond_dim: int,
        width: int = 1024,
        depth: int = 3,
        diffusion_batch_mul: int = 4,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__()
        check_sizes(token_dim=token_dim, cond_dim=cond_dim, width=width, depth=depth, diffusion_batch_mul=diffusion_batch_mul)
        check_prediction("prediction", prediction)
        self.token_size = self.token_dim = token_dim
        self.cond_dim, self.diffusion_batch_mul = cond_dim, diffusion_batch_mul
        self.prediction: Prediction = prediction
        self.net = DenoisingMLP(token_dim, cond_dim, width, depth)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """The diffusion loss (Eq. 1, plus the variance's bound): [M] for z [M, Z] and target x [M, D] of about unit std.

        The noise schedule assumes that standard deviation.
        """
        check_rows(z, target, self.cond_dim, self.token_dim)
        k = self.diffusion_batch_mul
        t = torch.randint(TRAIN_STEPS, (k, *z.shape[:-1]), device=z.device)
        loss = self.loss_terms(z, target, t, torch.randn(k, *target.shape, device=z.device)).total
        add_loss_by_quarter(self.time_losses, t / TRAIN_STEPS, loss)
        return loss.mean(0)

    def loss_terms(self, z: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """Both terms for given timesteps t [...] in 0..999 and noise [..., D]; z [..., Z] and x0 [..., D] are broadcast."""
        return loss_terms(lambda x: self.net(x, t, z), self.prediction, x0, t, noise)

    def draw(
        self, z: Tensor, *, options: DiffusionOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        sampler = SAMPLERS[options.sampler]
        with without_autocast(z):
            x = sampler.run(
                self.denoiser(z.float(), guidance),
                noise.normal(Purpose.INITIAL, 0, self.token_dim),
                coefficients(sampler.schedule(options.diffusion_steps), z.device),
                temperature=temperature,
                step_noise=lambda i: noise.normal(Purpose.STEP, i, self.token_dim),
            )
        return HeadSample(x)

    def denoiser(self, z: Tensor, guidance: Guidance | None) -> Denoise:
        """denoise(x, t) -> (eps, v) for z, with z's share of the condition computed once."""
        net, c = self.net, training_coefficients(z.device)
        y = net.condition(z if guidance is None else torch.cat((z, guidance.z_uncond.float())))

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            both = x if guidance is None else torch.cat((x, x))  # conditional and unconditional half see the same x_t
            out, v = net.denoise(both, net.modulate(net.time_embedding(t) + y))
            eps = predicted_eps(self.prediction, c, both, t[None], out)  # t is 0-d: one timestep for all rows
            if guidance is None:
                return eps, v
            # Guidance acts on eps only; the variance is the conditional half's.
            conditional, unconditional = eps.chunk(2)
            return guided(conditional, unconditional, guidance.scale), v[: len(x)]

        return denoise
