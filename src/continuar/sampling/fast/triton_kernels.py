"""The fused operations of the sampling loop in Triton; `Kernels` documents what each computes.

With many rows, each operation is one launch where PyTorch needs three to eight.

With few rows (`MAX_SMALL_ROWS`) a denoising step spends its time on launches and on reading weights. It then takes 2 x depth + 1
launches:

1. Per block, SiLU(Linear(modulated LayerNorm(h))). Every program normalises the few rows again and multiplies them by its part of
   the weights.
2. Per block, h + gate Linear(.).
3. Once, one program per row: the output layer of both halves (without the unconditional half's variance), guidance, the update of
   x, and the input layer of the next step.

Each program requests everything it reads together, so that it waits for memory once. Products are split along their inner
dimension, one part per warp, and the parts are summed at the end.

From Hopper on, a launch may begin while the one before it runs (programmatic dependent launch): it requests its weights, which no
launch writes, and then waits for the results of the launch before.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from continuar.heads.diffusion import LN_EPS, DenoisingMLP, ResidualBlock
from continuar.noise import KeyedNoise, Purpose
from continuar.sampling.fast.kernels import Kernels, Step

MAX_SMALL_ROWS = 16
"""Rows G R up to which `small_step` is used: one tile of a matrix unit."""


@dataclass(frozen=True)
class Launch:
    """Launch settings of the kernels for few rows."""

    columns: int = 16
    """Columns of a product's result that one program computes."""
    dependent: bool = False
    """A launch may begin before the one before it has ended."""

    @classmethod
    def on(cls, device: torch.device) -> Launch:
        """The fastest settings for a device."""
        return cls(dependent=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))

    def options(self, rows: int, width: int, low: bool) -> dict[str, Any]:
        """Arguments of the two kernels of a block; ``low``: weights of 16 bits instead of 32."""
        block = triton.next_power_of_2(width)
        warps = 8 if block <= 1024 else 16
        parts = min(warps, block // 16)
        columns = self.columns if low else min(8, self.columns)
        shape = {"M": max(4, triton.next_power_of_2(rows)), "N": columns, "PARTS": parts, "K": block // parts}
        return {**shape, "num_warps": warps, **self.dependence()}

    def dependence(self) -> dict[str, Any]:
        """Arguments of every kernel."""
        return {"DEPENDENT": True, "launch_pdl": True} if self.dependent else {"DEPENDENT": False}


@triton.jit
def _weight(weight_ptr, width, PARTS: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    # This program's rows of a Linear's weight, [PARTS, K, N].
    k = tl.arange(0, PARTS)[:, None, None] * K + tl.arange(0, K)[None, :, None]
    n = (tl.program_id(0) * N + tl.arange(0, N))[None, None, :]
    return tl.load(weight_ptr + n * width + k, (n < width) & (k < width), 0.0)


@triton.jit
def _norm_linear_silu(
    h_ptr, norm_weight_ptr, norm_bias_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr,
    rows, h_rows, modulation_stride, eps,
    width: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    row = m[None, :, None]
    k = tl.arange(0, PARTS)[:, None, None] * K + tl.arange(0, K)[None, None, :]
    inside = (row < rows) & (k < width)
    weight = _weight(weight_ptr, width, PARTS, K, N)
    bias = tl.load(bias_ptr + n, n < width, 0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + k, k < width, 0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + k, k < width, 0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    h = tl.load(h_ptr + (row % h_rows) * width + k, inside, 0.0)
    scale = tl.load(scale_ptr + row * modulation_stride + k, inside, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + row * modulation_stride + k, inside, 0.0).to(tl.float32)
    mean = tl.sum(tl.sum(h, 2), 0) / width
    centred = tl.where(inside, h - mean[None, :, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 2), 0) / width + eps)
    x = (centred * inverse[None, :, None] * norm_weight + norm_bias) * (1.0 + scale) + shift
    y = tl.sum(tl.dot(tl.where(inside, x, 0.0).to(weight.dtype), weight, input_precision="ieee"), 0) + bias[None, :]
    y = y / (1.0 + tl.exp(-y))
    at, both = m[:, None] * width + n[None, :], (m < rows)[:, None] & (n < width)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), both)


@triton.jit
def _linear_gate(
    x_ptr, weight_ptr, bias_ptr, gate_ptr, h_ptr, out_ptr,
    rows, h_rows, modulation_stride,
    width: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    row = m[None, :, None]
    k = tl.arange(0, PARTS)[:, None, None] * K + tl.arange(0, K)[None, None, :]
    weight = _weight(weight_ptr, width, PARTS, K, N)
    bias = tl.load(bias_ptr + n, n < width, 0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * width + k, (row < rows) & (k < width), 0.0)
    both = (m < rows)[:, None] & (n < width)[None, :]
    gate = tl.load(gate_ptr + m[:, None] * modulation_stride + n[None, :], both, 0.0).to(tl.float32)
    h = tl.load(h_ptr + (m % h_rows)[:, None] * width + n[None, :], both, 0.0)
    y = tl.sum(tl.dot(x, weight, input_precision="ieee"), 0) + bias[None, :]
    tl.store(out_ptr + m[:, None] * width + n[None, :], h + gate * y, both)


@triton.jit
def _modulated(h_ptr, shift_ptr, scale_ptr, column, width, eps):
    # One row's LayerNorm without weights, modulated.
    inside = column < width
    h = tl.load(h_ptr + column, inside, 0.0)
    scale = tl.load(scale_ptr + column, inside, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, h - tl.sum(h, 0) / width, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * inverse * (1.0 + scale) + shift


@triton.jit
def _finish(
    h_ptr, shift_ptr, scale_ptr, out_weight_ptr, out_bias_ptr, in_weight_ptr, in_bias_ptr, x_ptr, noise_ptr, guidance_ptr,
    x_next_ptr, h_next_ptr, a, b, c, rows, modulation_stride, dim, eps,
    width: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, d, column = tl.program_id(0), tl.arange(0, D), tl.arange(0, BLOCK)
    exists, inside = d < dim, column < width
    both = exists[:, None] & inside[None, :]
    out_at = out_weight_ptr + d[:, None] * width + column[None, :]
    in_at = in_weight_ptr + column[None, :] * dim + d[:, None]
    # Weights of more elements than this do not fit the registers together.
    EARLY: tl.constexpr = BLOCK * D <= 16 * 1024
    if EARLY:
        v_weight, out_weight, in_weight = (
            tl.load(out_at + dim * width, both, 0.0),
            tl.load(out_at, both, 0.0),
            tl.load(in_at, both, 0.0),
        )
    in_bias = tl.load(in_bias_ptr + column, inside, 0.0)
    out_bias, v_bias = tl.load(out_bias_ptr + d, exists, 0.0), tl.load(out_bias_ptr + dim + d, exists, 0.0)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * dim + d, exists, 0.0)
    noise = tl.load(noise_ptr + row * dim + d, exists, 0.0)
    at, modulation_at = row * width, row * modulation_stride
    n = _modulated(h_ptr + at, shift_ptr + modulation_at, scale_ptr + modulation_at, column, width, eps)
    if not EARLY:
        v_weight = tl.load(out_at + dim * width, both, 0.0)
    v = tl.sum(v_weight * n[None, :], 1) + v_bias
    if not EARLY:
        out_weight = tl.load(out_at, both, 0.0)
    prediction = tl.sum(out_weight * n[None, :], 1) + out_bias
    if GUIDED:
        at += rows * width
        modulation_at += rows * modulation_stride
        n = _modulated(h_ptr + at, shift_ptr + modulation_at, scale_ptr + modulation_at, column, width, eps)
        unconditional = tl.sum(out_weight * n[None, :], 1) + out_bias
        prediction = unconditional + tl.load(guidance_ptr) * (prediction - unconditional)
    x = tl.where(exists, a * x + b * prediction + tl.exp(c * v) * noise, 0.0)
    tl.store(x_next_ptr + row * dim + d, x, exists)
    if not EARLY:
        in_weight = tl.load(in_at, both, 0.0)
    tl.store(h_next_ptr + row * width + column, tl.sum(in_weight * x[:, None], 0) + in_bias, inside)


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
        # h is rounded as it is stored, so that the norm sees the value that the next layer adds to.
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
    # Element i of x [R, D] has its prediction at `at` in out [G, R, 2 D], and its v behind it.
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
    # `noise.philox` in uint32. Element i is one block of four words, of step i // (rows blocks) and row (i // blocks) % rows.
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
    # `static_range` unrolls the ten rounds.
    for _ in tl.static_range(10):
        hi0, lo0, hi1, lo1 = tl.umulhi(c0, m0), c0 * m0, tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + w0, k1 + w1
    # Uniforms are (word + 0.5) 2^-32, then Box-Muller, as in `noise`.
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
    """The fused operations.

    Args:
        few_rows: rows G R up to which `small_step` is used.
        launch: None: the fastest settings for the device.
    """

    name = "triton"

    def __init__(self, few_rows: int = MAX_SMALL_ROWS, launch: Launch | None = None) -> None:
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
        # cuBLAS fuses only the tanh form of GELU into the product, which is off by less than 0.0005: too much for float32.
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
        copies, rows, _ = modulation.shape
        width, total = net.width, copies * rows
        assert total <= MAX_SMALL_ROWS
        assert all(tensor.is_contiguous() for tensor in (x, h, modulation, step.noise))
        part = modulation.unflatten(-1, (-1, width)).unbind(-2)
        stride, options = modulation.shape[-1], self._launch.options(total, width, modulation.dtype != torch.float32)
        grid = (triton.cdiv(width, options["N"]),)
        for i, block in enumerate(cast(Iterable[ResidualBlock], net.blocks)):
            shift, scale, gate = part[3 * i : 3 * i + 3]
            first, second = block.mlp[0], block.mlp[2]
            hidden = torch.empty(total, width, dtype=shift.dtype, device=h.device)
            h_rows = h.shape[0] * h.shape[1]
            _norm_linear_silu[grid](
                h, block.norm.weight, block.norm.bias, shift, scale, first.weight, first.bias, hidden,
                total, h_rows, stride, LN_EPS, width=width, **options,
            )  # fmt: skip
            after = torch.empty(copies, rows, width, device=h.device)
            _linear_gate[grid](
                hidden, second.weight, second.bias, gate, h, after, total, h_rows, stride, width=width, **options
            )  # fmt: skip
            h = after
        x_next, h_next, dim = torch.empty_like(x), torch.empty(1, rows, width, device=h.device), x.shape[-1]
        _finish[(rows,)](
            h, part[-2], part[-1], exact.output.weight, exact.output.bias, exact.input.weight, exact.input.bias, x, step.noise,
            step.guidance, x_next, h_next, step.a, step.b, step.c, rows, stride, dim, LN_EPS,
            width=width, GUIDED=copies == 2, BLOCK=triton.next_power_of_2(width), D=triton.next_power_of_2(dim), num_warps=16,
            **self._launch.dependence(),
        )  # fmt: skip
        return x_next, h_next

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
        # The modulations are parts of one long row, so consecutive rows are that row's length apart.
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
