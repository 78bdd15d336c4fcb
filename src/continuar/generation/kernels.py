"""Operations of the sampling loop that are worth fusing, and who computes them: PyTorch (`Kernels`) or Triton (`TritonKernels`).

The plain ones say what each computes; the fused ones (`triton_kernels.py`) equal them up to rounding.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.heads.mlp import LN_EPS
from continuar.noise import KeyedNoise, Purpose

_LOG = logging.getLogger(__name__)


class Kernels:
    """Plain PyTorch."""

    name = "plain"

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
            dtype: of the second result.

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

    def update(self, x: Tensor, out: Tensor, guidance: Tensor, noise: Tensor, a: float, b: float, c: float) -> Tensor:
        """One step of ancestral sampling: a x + b guided + exp(c v) noise, [R, D].

        Args:
            x: [R, D] float32.
            out: [G, R, 2 D] float32: the prediction, then v; v is the conditional half's.
            guidance: 0-d, used where G = 2.
            noise: [R, D] float32.
        """
        dim = x.shape[-1]
        guided = out[0, :, :dim] if len(out) == 1 else torch.lerp(out[1, :, :dim], out[0, :, :dim], guidance)
        return torch.addcmul(torch.add(a * x, guided, alpha=b), (c * out[0, :, dim:]).exp(), noise)

    def normals(self, noise: KeyedNoise, purpose: Purpose, steps: int, dim: int) -> Tensor:
        """Standard normal [steps, R, dim] of steps 0 to ``steps`` - 1."""
        return noise.normals(purpose, steps, dim)


@cache
def best_kernels(device_type: str) -> Kernels:
    """The fused ones on a CUDA device that has Triton, else the plain ones; says so once."""
    if device_type != "cuda":
        return Kernels()
    try:
        from continuar.generation.triton_kernels import TritonKernels
    except ImportError as problem:
        _LOG.warning("no Triton (%s): the sampling loop runs without fused kernels", problem)
        return Kernels()
    return TritonKernels()
