"""Operations of the sampling loop that are worth fusing: their interface, implemented in plain PyTorch.

`TritonKernels` (triton_kernels.py) fuses them and equals these up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continuar.heads.diffusion import LN_EPS, DenoisingMLP, ResidualBlock
from continuar.noise import KeyedNoise, Purpose


@dataclass(frozen=True)
class Step:
    """Values of one step of ancestral sampling: x <- a x + b guided + exp(c v) noise."""

    guidance: Tensor
    """The guidance scale, 0-d; used if there are two halves."""
    noise: Tensor
    """[R, D] float32."""
    a: float
    b: float
    c: float


class Kernels:
    """The operations in plain PyTorch. G is 2 with guidance and 1 without, R rows, D token dim, W width."""

    name = "plain"
    few_rows = 0
    """Rows G R up to which `small_step` is faster than `denoise` and `update`; in PyTorch it never is."""

    def gate_norm_modulate(
        self,
        h: Tensor,
        gated: tuple[Tensor, Tensor] | None,
        affine: tuple[Tensor, Tensor] | None,
        shift: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """h <- h + gate y, then LayerNorm(h) (1 + scale) + shift.

        Args:
            h: the residual stream, [G, R, W] or [1, R, W] shared by all of G; float32.
            gated: (gate, y), [G, R, W] each; None: nothing is added.
            affine: the LayerNorm's own weight and bias [W], or None.
            shift, scale: [G, R, W].
            dtype: the dtype of the second result.

        Returns:
            (h, modulated [G, R, W]).
        """
        if gated is not None:
            h = h + gated[0] * gated[1] if h.dtype != gated[0].dtype else torch.addcmul(h, *gated)
        weight, bias = (None, None) if affine is None else (affine[0].to(h.dtype), affine[1].to(h.dtype))
        n = F.layer_norm(h, h.shape[-1:], weight, bias, eps=LN_EPS)
        if dtype == torch.float32:
            shift, scale = shift.float(), scale.float()
        return h, torch.addcmul(shift, n.to(dtype), 1 + scale)

    def add_norm(self, h: Tensor, y: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """h <- h + y unless y is None, then LayerNorm: (h, normalised), all [..., W] of one dtype."""
        h = h if y is None else h + y
        return h, norm(h)

    def mlp(self, mlp: nn.Sequential, n: Tensor) -> Tensor:
        """A transformer block's MLP without dropout: Linear(GELU(Linear(n)))."""
        return mlp(n)

    def update(self, x: Tensor, out: Tensor, step: Step) -> Tensor:
        """One step of ancestral sampling, [R, D].

        Args:
            x: [R, D] float32.
            out: [G, R, 2 D] float32: the prediction, then v. Only the conditional half's v is used.
        """
        dim = x.shape[-1]
        guided = out[0, :, :dim] if len(out) == 1 else torch.lerp(out[1, :, :dim], out[0, :, :dim], step.guidance)
        return torch.addcmul(torch.add(step.a * x, guided, alpha=step.b), (step.c * out[0, :, dim:]).exp(), step.noise)

    def small_step(
        self, net: DenoisingMLP, exact: DenoisingMLP, x: Tensor, h: Tensor, modulation: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """One step of ancestral sampling with its network: (x [R, D], h [1, R, W]), where h is the input layer of x.

        Args:
            net: its blocks are used.
            exact: the same network in float32; its input and output layers are used.
            x, h: as the last step returned them.
            modulation: [G, R, (3 depth + 2) W].
        """
        # The loop keeps h beside x, because the fused version computes the next step's input layer in its last kernel.
        x = self.update(x, self.denoise(net, exact, h, modulation), step)
        return x, exact.input(x).unsqueeze(0)

    def denoise(self, net: DenoisingMLP, exact: DenoisingMLP, h: Tensor, modulation_GRM: Tensor) -> Tensor:
        """`DenoisingMLP.denoise` after its input layer, float32 [G, R, outputs D].

        Args:
            h: [1, R, W] float32; both halves of guidance start from the same x.
        """
        part = modulation_GRM.unflatten(-1, (-1, net.width)).unbind(-2)
        gated: tuple[Tensor, Tensor] | None = None
        for i, block in enumerate(cast(Iterable[ResidualBlock], net.blocks)):
            shift, scale, gate = part[3 * i : 3 * i + 3]
            h, n = self.gate_norm_modulate(h, gated, (block.norm.weight, block.norm.bias), shift, scale, shift.dtype)
            gated = gate, block.mlp(n)
        _, n = self.gate_norm_modulate(h, gated, None, part[-2], part[-1], torch.float32)
        return exact.output(n)

    def normals(self, noise: KeyedNoise, purpose: Purpose, steps: int, dim: int) -> Tensor:
        """Standard normal [steps, R, dim] of steps 0 to ``steps`` - 1."""
        return noise.normals(purpose, steps, dim)


@torch.no_grad()
def largest_difference(kernels: Kernels, device: torch.device) -> float:
    """The largest difference to the plain kernels on small float32 inputs: LayerNorm, a full guided step, and noise."""
    plain, generator = Kernels(), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rows, dim, width = 3, 6, 40
    net = DenoisingMLP(dim, 8, width, 1).requires_grad_(False)
    for parameter in net.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    net.to(device)
    x, noise, modulation, guidance = normal(rows, dim), normal(rows, dim), normal(2, rows, 5 * width), normal(1)[0]
    step, norm = Step(guidance, noise, 0.9, -0.3, 0.2), net.blocks[0].norm
    h, rows_noise = net.input(x).unsqueeze(0), KeyedNoise(torch.arange(rows, device=device) - 1, torch.arange(rows, device=device))
    pairs = [
        (*k.add_norm(modulation[..., :width], modulation[..., width : 2 * width], cast(nn.LayerNorm, norm)),
         k.update(x, k.denoise(net, net, h, modulation), step), *k.small_step(net, net, x, h, modulation, step),
         k.normals(rows_noise, Purpose.STEP, 3, dim))
        for k in (kernels, plain)
    ]  # fmt: skip
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(*pairs, strict=True))
