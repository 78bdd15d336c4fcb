# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
"""The denoising step for few rows, in 2 depth + 1 launches: there, launching and reading weights is what takes the time.

1. Per block, SiLU(Linear(modulated LayerNorm(h))): every program normalises the few rows anew and multiplies them by its share of
   the weights.
2. Per block, h + gate Linear(.).
3. Once, a program per row: output layer of both halves (of the unconditional one no variance), guidance, update of x, and the input
   layer of the next step.

Each program asks for all it needs at once, so that it waits for memory once. Products are split along their inner dimension, a part
for each warp, whose sums are added up at the end.

From Hopper on, a launch may begin while the one before it runs (programmatic dependent launch): it asks for its weights, which no
launch writes, and only then waits for what the one before wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from continuar.generation.kernels import Step
from continuar.heads.mlp import LN_EPS, Block, DenoisingMLP

MOST_ROWS = 16
"""G R up to which this is used: one tile of a matrix unit."""


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched."""

    columns: int = 16
    """Of a product's result that one program computes."""
    dependent: bool = False
    """Whether a launch may begin before the one before it has ended."""

    @classmethod
    def on(cls, device: torch.device) -> Launch:
        """The best for a device."""
        return cls(dependent=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))

    def options(self, rows: int, width: int, low: bool) -> dict[str, Any]:
        """Arguments of the two kernels of a block, for weights of 16 bits or of 32."""
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
    # More than this do not fit the registers at once.
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


def small_step(
    net: DenoisingMLP, exact: DenoisingMLP, x: Tensor, h: Tensor, modulation_GRM: Tensor, step: Step, launch: Launch
) -> tuple[Tensor, Tensor]:
    """One ancestral step, `Kernels.denoise` and `Kernels.update` in one: (x [R, D], h [1, R, W]), where h is ``exact.input(x)``.

    Args:
        x, h: as the last step returned them.
        modulation_GRM: contiguous.
    """
    copies, rows, _ = modulation_GRM.shape
    width, total = net.width, copies * rows
    assert total <= MOST_ROWS
    assert all(tensor.is_contiguous() for tensor in (x, h, modulation_GRM, step.noise))
    part = modulation_GRM.unflatten(-1, (-1, width)).unbind(-2)
    stride, options = modulation_GRM.shape[-1], launch.options(total, width, modulation_GRM.dtype != torch.float32)
    grid = (triton.cdiv(width, options["N"]),)
    for i, block in enumerate(cast(Iterable[Block], net.blocks)):
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
        **launch.dependence(),
    )  # fmt: skip
    return x_next, h_next
