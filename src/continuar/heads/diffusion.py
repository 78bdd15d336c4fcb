"""The denoising MLP (paper, Section 4.1): residual blocks whose LayerNorms are modulated by timestep and condition (adaLN-zero).

The diffusion head: p(x | z) by a small denoising network (paper, Sections 3.2 and 3.3).

Usable alone, for any vectors x that depend on any condition z: ``head.loss(z, x)`` and ``head.sample(z)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from continuar.diffusion.samplers import SAMPLERS, SamplerName, check_sampler, check_temperature
from continuar.errors import require
from continuar.heads.base import Guidance, Head, HeadSample, Options, check_rows, check_sizes
from continuar.noise import Purpose, RowNoise
from continuar.tensors import without_autocast

LN_EPS = 1e-6
TIME_FEATURES = 256


def timestep_features(t: Tensor, features: int = TIME_FEATURES, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features, cosines first, frequencies max_period^(-i/(features/2)). [...] -> [..., features] float32."""
    half = features // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


class Block(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        # Autocast gives LayerNorm's output in float32; the Linear would round it all the same, after three times the traffic.
        return x + gate * self.mlp(torch.addcmul(shift, self.norm(x).to(shift.dtype), 1 + scale))


class DenoisingMLP(nn.Module):
    """Outputs of the size of x from (x_t, t, z): eps and v of a diffusion, the velocity of a flow.

    All adaLN projections are one Linear: they share their input SiLU(y), so one matrix product serves every block. Its rows are
    (shift, scale, gate) of block 0, 1, ..., then (shift, scale) of the final layer.

    Args:
        token_dim: D. cond_dim: Z. width: W. depth: blocks. outputs: how many vectors [M, D] it gives.
    """

    def __init__(self, token_dim: int, cond_dim: int, width: int, depth: int, outputs: int = 2) -> None:
        super().__init__()
        self.token_dim, self.width, self.depth = token_dim, width, depth
        self.input = nn.Linear(token_dim, width)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(cond_dim, width)
        self.modulation = nn.Linear(width, (3 * depth + 2) * width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.outputs = outputs
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
        """[...] timesteps 0 to 1000 -> [..., W], always in float32: t = 999 is 1000 in bf16."""
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
        with without_autocast(h):
            h = h.to(self.output.weight.dtype)
            h = torch.addcmul(shift.to(h.dtype), F.layer_norm(h, (self.width,), eps=LN_EPS), 1 + scale.to(h.dtype))
            return self.output(h).chunk(self.outputs, dim=-1)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """(x_t [..., D], t [...] or 0-d, z [..., Z]) -> the outputs, [..., D] each; leading dimensions are broadcast.

        t: int64 timesteps 0..999, or times of about 0..1000 as floats.
        """
        condition = self.condition(z)
        return self.denoise(x, self.modulate(self._times(t).to(condition.dtype) + condition))

    def _times(self, t: Tensor) -> Tensor:
        """`time_embedding`, once for each different timestep where whole ones are given and there are more rows than timesteps."""
        if t.is_floating_point() or t.numel() <= TRAIN_STEPS:
            return self.time_embedding(t)
        return F.embedding(t, self.time_embedding(torch.arange(TRAIN_STEPS, device=t.device)))


@dataclass(frozen=True)
class DiffusionOptions(Options):
    """How to denoise a token. The temperature scales the noise that steps add."""

    kind: Literal["diffusion"] = "diffusion"
    diffusion_steps: int = 100
    """Denoising steps per token, 1 to 1000, to 980 with the others but "ddpm"; 100 suffice (paper, Figure 4)."""
    sampler: SamplerName = "ddpm"
    """"ddpm" is the paper's; "ddim" and "dpmpp_2m" are deterministic given x_T and have no temperature; "dpmpp_2m" needs
    fewest steps;
    "dpmpp_2m_sde" is its stochastic form."""

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.diffusion_steps)

    def check_temperature(self, temperature: float) -> None:
        super().check_temperature(temperature)
        check_temperature(self.sampler, temperature)


@dataclass(frozen=True)
class DiffusionHeadConfig:
    """The diffusion head. Paper: width 1024, 3 blocks (Table 3); B 6 x 1024, L 8 x 1280, H 12 x 1536 (Table 4)."""

    kind: Literal["diffusion"] = "diffusion"
    width: int = 1024
    """Width of the denoising MLP."""
    depth: int = 3
    """Residual blocks of the denoising MLP."""
    diffusion_batch_mul: int = 4
    """Noise levels drawn per token and training step (paper, Section 3.2: 4)."""
    prediction: Prediction = "epsilon"
    """What the network predicts: "epsilon" as the paper's, or "v_prediction" (Salimans & Ho 2022), which small or
    short-trained heads need:
    sampling multiplies an error of eps at t = 999 by 300 and more, and a velocity has none there."""
    token_kind: ClassVar[Literal["vector", "id"]] = "vector"
    has_log_prob: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "diffusion_batch_mul"):
            require(getattr(self, name) >= 1, f"head.{name} is {getattr(self, name)}; allowed: 1 or more")
        require(
            self.prediction in ("epsilon", "v_prediction"),
            f"head.prediction is '{self.prediction}'; allowed: epsilon, v_prediction",
        )

    def options(self) -> DiffusionOptions:
        """The default options."""
        return DiffusionOptions()

    def build(self, token_size: int, cond_dim: int) -> DiffusionHead:
        """The head for tokens of ``token_size`` dimensions and condition vectors of ``cond_dim``."""
        return DiffusionHead(
            token_size,
            cond_dim,
            width=self.width,
            depth=self.depth,
            diffusion_batch_mul=self.diffusion_batch_mul,
            prediction=self.prediction,
        )


class DiffusionHead(Head):
    """Diffusion loss and sampler for one token given z.

    Args:
        token_dim: D, the size of x.
        cond_dim: Z, the size of the condition vector.
        width, depth: of the denoising MLP.
        diffusion_batch_mul: draws of (t, noise) per row in `loss`.
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
        self.token_size = token_dim
        check_sizes(token_dim=token_dim, cond_dim=cond_dim, width=width, depth=depth, diffusion_batch_mul=diffusion_batch_mul)
        self.token_dim, self.cond_dim, self.diffusion_batch_mul = token_dim, cond_dim, diffusion_batch_mul
        require(prediction in ("epsilon", "v_prediction"), f"prediction is '{prediction}'; allowed: epsilon, v_prediction")
        self.prediction: Prediction = prediction
        self.net = DenoisingMLP(token_dim, cond_dim, width, depth)

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """The diffusion loss (paper, Eq. 1, plus the variance's bound): [M] for z [M, Z] and target x [M, D].

        x is expected at about unit standard deviation: the noise schedule assumes it.
        """
        check_rows(z, target, self.cond_dim, self.token_dim)
        k = self.diffusion_batch_mul
        t = torch.randint(TRAIN_STEPS, (k, *z.shape[:-1]), device=z.device)
        noise = torch.randn(k, *target.shape, device=z.device)
        loss = self.loss_terms(z, target, t, noise).total
        self.record_loss_by_timestep(t / TRAIN_STEPS, loss)
        return loss.mean(0)

    def loss_terms(self, z: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """Both terms for given timesteps t [...] in 0..999 and noise [..., D]; z [..., Z] and x0 [..., D] are broadcast."""
        return loss_terms(lambda x: self.net(x, t, z), self.prediction, x0, t, noise)

    def draw(
        self, z: Tensor, *, options: DiffusionOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
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
            return predicted_eps(self.prediction, c, x, t[None], out), v

        if guidance is None:
            y = net.condition(z)
            return lambda x, t: evaluate(x, t, y)
        y = net.condition(torch.cat((z, guidance.z_uncond.float())))

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            eps, v = evaluate(torch.cat((x, x)), t, y)
            eps_cond, eps_uncond = eps.chunk(2)
            return eps_uncond + guidance.scale * (eps_cond - eps_uncond), v[: len(x)]

        return denoise
