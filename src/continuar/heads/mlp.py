"""The denoising MLP (paper, Section 4.1): residual blocks whose LayerNorms are modulated by timestep and condition (adaLN-zero)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.diffusion.schedule import TRAIN_STEPS
from continuar.precision import without_autocast

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
