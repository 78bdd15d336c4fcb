# pyright: reportMissingImports=false, reportIndexIssue=false
"""The fused operations of the sampling loop in Triton: each is one launch where PyTorch needs three to eight."""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from continuar.generation.kernels import Kernels, Step
from continuar.generation.triton_small import MOST_ROWS, Launch, small_step
from continuar.heads.mlp import LN_EPS, DenoisingMLP
from continuar.noise import KeyedNoise, Purpose


@triton.jit
def _gate_norm_modulate(
    h_ptr, gate_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, h_out_ptr, n_ptr, h_rows, modulation_stride, width, eps,
    GATED: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per row of G R.
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(h_ptr + (row % h_rows) * width + column, inside, 0.0).to(tl.float32)
    at = row.to(tl.int64) * modulation_stride + column
    if GATED:
        gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
        h += gate * tl.load(y_ptr + row * width + column, inside, 0.0).to(tl.float32)
        tl.store(h_out_ptr + row * width + column, h, inside)
    mean = tl.sum(h, 0) / width
    centred = tl.where(inside, h - mean, 0.0)
    n = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps))
    if AFFINE:
        weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
        n = n * weight + tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + at, inside, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + at, inside, 0.0).to(tl.float32)
    n = n * (1.0 + scale) + shift
    tl.store(n_ptr + row * width + column, n.to(n_ptr.dtype.element_ty), inside)


@triton.jit
def _add_norm(
    h_ptr, y_ptr, weight_ptr, bias_ptr, h_out_ptr, n_ptr, width, eps, ADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside, at = column < width, tl.program_id(0).to(tl.int64) * width + column
    h = tl.load(h_ptr + at, inside, 0.0)
    if ADDED:
        # Rounded as it is kept, so that the norm is of what the next layer adds to.
        h = (h.to(tl.float32) + tl.load(y_ptr + at, inside, 0.0).to(tl.float32)).to(h_out_ptr.dtype.element_ty)
        tl.store(h_out_ptr + at, h, inside)
    h = h.to(tl.float32)
    centred = tl.where(inside, h - tl.sum(h, 0) / width, 0.0)
    n = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps))
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    n = n * weight + tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), inside)


@triton.jit
def _update(
    x_ptr, out_ptr, guidance_ptr, noise_ptr, next_ptr, a, b, c, count, dim, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Elements of x [R, D] in a row; those of out [G, R, 2 D] lie at twice the row.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    at = (i // dim) * 2 * dim + i % dim
    out = tl.load(out_ptr + at, inside, 0.0)
    if GUIDED:
        uncond = tl.load(out_ptr + 2 * count + at, inside, 0.0)
        out = uncond + tl.load(guidance_ptr) * (out - uncond)
    v = tl.load(out_ptr + at + dim, inside, 0.0)
    x, noise = tl.load(x_ptr + i, inside, 0.0), tl.load(noise_ptr + i, inside, 0.0)
    tl.store(next_ptr + i, a * x + b * out + tl.exp(c * v) * noise, inside)


@triton.jit
def _philox_normal(
    seeds_ptr, positions_ptr, out_ptr, rows, dim, blocks, round_step, count, PURPOSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Element i is one block of four words: of step i // (rows blocks), row (i // blocks) % rows. `noise.philox` in uint32.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    block, row, step = i % blocks, (i // blocks) % rows, i // (blocks * rows)
    seed = tl.load(seeds_ptr + row, inside, 0)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = tl.load(positions_ptr + row, inside, 0).to(tl.uint32)
    c1 = (step + round_step).to(tl.uint32)
    c2 = tl.full(c0.shape, PURPOSE, tl.uint32)
    c3 = block.to(tl.uint32)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full(c0.shape, 0x9E3779B9, tl.uint32)
    w1 = tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0, hi1, lo1 = tl.umulhi(c0, m0), c0 * m0, tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + w0, k1 + w1
    u0, u1 = (c0.to(tl.float32) + 0.5) * 2.3283064365386963e-10, (c1.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u2, u3 = (c2.to(tl.float32) + 0.5) * 2.3283064365386963e-10, (c3.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    r0, r1 = tl.sqrt(-2.0 * tl.log(u0)), tl.sqrt(-2.0 * tl.log(u2))
    a0, a1 = 6.283185307179586 * u1, 6.283185307179586 * u3
    at = out_ptr + (step.to(tl.int64) * rows + row) * dim + 4 * block
    tl.store(at, r0 * tl.cos(a0), inside & (4 * block < dim))
    tl.store(at + 1, r0 * tl.sin(a0), inside & (4 * block + 1 < dim))
    tl.store(at + 2, r1 * tl.cos(a1), inside & (4 * block + 2 < dim))
    tl.store(at + 3, r1 * tl.sin(a1), inside & (4 * block + 3 < dim))


class TritonKernels(Kernels):
    """See the module's docstring; what each computes is said in `Kernels`."""

    name = "triton"

    def __init__(self, few_rows: int = MOST_ROWS, launch: Launch | None = None) -> None:
        self.few_rows, self._launch = few_rows, launch

    def add_norm(self, h: Tensor, y: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        h, width = h.contiguous(), h.shape[-1]
        added = h if y is None else y.contiguous()
        h_out, n = h if y is None else torch.empty_like(h), torch.empty_like(h)
        _add_norm[(h.numel() // width,)](
            h, added, norm.weight, norm.bias, h_out, n, width, norm.eps,
            ADDED=y is not None, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        return h_out, n

    def mlp(self, mlp: nn.Sequential, n: Tensor) -> Tensor:
        # The product's own epilogue knows GELU by its tanh form alone, which is off by less than 0.0005.
        if n.dtype != torch.bfloat16:
            return mlp(n)
        up, down = cast(nn.Linear, mlp[0]), cast(nn.Linear, mlp[3])
        hidden = torch.ops.aten._addmm_activation(up.bias, n.flatten(0, -2), up.weight.t(), use_gelu=True)
        return down(hidden).view(*n.shape[:-1], -1)

    def small_step(
        self, net: DenoisingMLP, exact: DenoisingMLP, x: Tensor, h: Tensor, modulation: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        if self._launch is None:
            self._launch = Launch.on(x.device)
        return small_step(net, exact, x, h, modulation, step, self._launch)

    def gate_norm_modulate(
        self,
        h: Tensor,
        gated: tuple[Tensor, Tensor] | None,
        affine: tuple[Tensor, Tensor] | None,
        shift: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        width, rows = h.shape[-1], shift.shape[0] * shift.shape[1]
        # Parts of one row of modulations: their rows are that row's length apart.
        stride = shift.stride(1)
        assert h.is_contiguous()
        assert shift.stride(-1) == scale.stride(-1) == 1
        gate, y = gated if gated is not None else (shift, h)
        assert shift.stride() == scale.stride() == gate.stride()
        assert len(shift) == 1 or shift.stride(0) == shift.shape[1] * stride
        assert y.is_contiguous()
        h_out = torch.empty(shift.shape, dtype=h.dtype, device=h.device) if gated is not None else h
        n = torch.empty(shift.shape, dtype=dtype, device=h.device)
        _gate_norm_modulate[(rows,)](
            h, gate, y, *(affine or (h, h)), shift, scale, h_out, n, h.shape[0] * h.shape[1], stride, width, LN_EPS,
            GATED=gated is not None, AFFINE=affine is not None, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        return h_out, n

    def update(self, x: Tensor, out: Tensor, step: Step) -> Tensor:
        assert all(tensor.is_contiguous() for tensor in (x, out, step.noise))
        after, block = torch.empty_like(x), 256
        _update[(triton.cdiv(x.numel(), block),)](
            x, out, step.guidance, step.noise, after, step.a, step.b, step.c, x.numel(), x.shape[-1],
            GUIDED=len(out) == 2, BLOCK=block,
        )  # fmt: skip
        return after

    def normals(self, noise: KeyedNoise, purpose: Purpose, steps: int, dim: int) -> Tensor:
        rows, blocks, block = len(noise.seeds), -(-dim // 4), 256
        out = torch.empty(steps, rows, dim, device=noise.seeds.device)
        count = steps * rows * blocks
        _philox_normal[(triton.cdiv(count, block),)](
            noise.seeds.contiguous(), noise.positions.contiguous(), out, rows, dim, blocks, noise.round << 16,
            count, PURPOSE=int(purpose), BLOCK=block,
        )  # fmt: skip
        return out
