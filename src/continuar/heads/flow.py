"""The flow head: p(x | z) by a velocity field along straight paths.

Flow matching (Lipman et al. 2023), rectified flow (Liu et al. 2023): x_t = (1 - t) n + t x with n ~ N(0, I) and t in [0, 1]; the
network predicts the velocity x - n of that path.

Drawing, from x_0 = temperature n, for i = 0 .. S-1 with t = i/S:
1. v = velocity(x, t); guided: v_u + w (v_c - v_u), both halves at the same x.
2. Euler: x += v/S. Heun: x += (v + velocity(x + v/S, t + 1/S))/(2 S).

An alternative to the paper's diffusion head; never the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from continuar.errors import check_sizes, require
from continuar.heads.base import Guidance, Head, HeadSample, HeadTraits, Options
from continuar.heads.diffusion import DenoisingMLP, guided
from continuar.noise import Purpose, RowNoise
from continuar.tensors import add_loss_by_quarter, check_rows, without_autocast

Solver = Literal["euler", "heun"]
TIME_SCALE = 1000.0
"""The timestep features expect times of about 0..1000."""


@dataclass(frozen=True)
class FlowOptions(Options):
    """How to follow the velocity field. The temperature scales the noise it starts from."""

    kind: Literal["flow"] = "flow"
    flow_steps: int = 50
    """Steps along the path, 1 or more; Heun evaluates the network twice in each."""
    solver: Solver = "euler"
    """"euler" (first order) or "heun" (second order)."""

    def __post_init__(self) -> None:
        require(self.flow_steps >= 1, f"flow_steps is {self.flow_steps}; allowed: 1 or more")
        require(self.solver in get_args(Solver), f"solver is '{self.solver}'; allowed: {', '.join(get_args(Solver))}")


@dataclass(frozen=True)
class FlowHeadConfig(HeadTraits):
    """Straight-path flow matching with the diffusion head's MLP."""

    kind: Literal["flow"] = "flow"
    width: int = 1024
    """W of the MLP."""
    depth: int = 3
    """Residual blocks of the MLP."""
    diffusion_batch_mul: int = 4
    """Times drawn per token and training step."""

    def __post_init__(self) -> None:
        check_sizes("head.", width=self.width, depth=self.depth, diffusion_batch_mul=self.diffusion_batch_mul)

    def options(self) -> FlowOptions:
        return FlowOptions()

    def build(self, token_size: int, cond_dim: int) -> FlowHead:
        return FlowHead(token_size, cond_dim, self.width, self.depth, self.diffusion_batch_mul)


class FlowHead(Head):
    """Flow-matching loss and sampler for one token given z.

    Args:
        token_dim: D. cond_dim: Z. width, depth: of the MLP. diffusion_batch_mul: draws of (t, n) per row in the loss.
    """

    options_type = FlowOptions

    def __init__(self, token_dim: int, cond_dim: int, width: int = 1024, depth: int = 3, diffusion_batch_mul: int = 4) -> None:
        super().__init__()
        check_sizes(token_dim=token_dim, cond_dim=cond_dim, width=width, depth=depth, diffusion_batch_mul=diffusion_batch_mul)
        self.token_size = self.token_dim = token_dim
        self.cond_dim, self.diffusion_batch_mul = cond_dim, diffusion_batch_mul
        self.net = DenoisingMLP(token_dim, cond_dim, width, depth, outputs=1)

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Squared error of the velocity, mean over dimensions and draws: [M] for z [M, Z] and x [M, D] of about unit std."""
        check_rows(z, target, self.cond_dim, self.token_dim)
        k = self.diffusion_batch_mul
        t = torch.rand(k, *z.shape[:-1], device=z.device)
        noise = torch.randn(k, *target.shape, device=z.device)
        x = target.float()
        with without_autocast(z):
            point = torch.lerp(noise, x.expand_as(noise), t.unsqueeze(-1))
        (velocity,) = self.net(point, TIME_SCALE * t, z)
        loss = (velocity.float() - (x - noise)).square().mean(-1)
        add_loss_by_quarter(self.time_losses, t, loss)
        return loss.mean(0)

    def draw(
        self, z: Tensor, *, options: FlowOptions, temperature: Tensor, noise: RowNoise, guidance: Guidance | None = None
    ) -> HeadSample:
        with without_autocast(z):
            velocity = self.velocity(z.float(), guidance)
            x = temperature * noise.normal(Purpose.INITIAL, 0, self.token_dim)
            size = 1 / options.flow_steps
            times = TIME_SCALE * size * torch.arange(options.flow_steps + 1, device=x.device)
            for i in range(options.flow_steps):
                v = velocity(x, times[i])
                if options.solver == "heun":
                    v = (v + velocity(x + size * v, times[i + 1])) / 2
                x = x + size * v
        return HeadSample(x)

    def velocity(self, z: Tensor, guidance: Guidance | None) -> Callable[[Tensor, Tensor], Tensor]:
        """velocity(x, TIME_SCALE t) for z, with z's share of the condition computed once."""
        net = self.net
        y = net.condition(z if guidance is None else torch.cat((z, guidance.z_uncond.float())))

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            both = x if guidance is None else torch.cat((x, x))
            (v,) = net.denoise(both, net.modulate(net.time_embedding(time) + y))
            if guidance is None:
                return v
            conditional, unconditional = v.chunk(2)
            return guided(conditional, unconditional, guidance.scale)

        return velocity
