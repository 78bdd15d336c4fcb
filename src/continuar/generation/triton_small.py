# pyright: reportMissingImports=false, reportIndexIssue=false
"""The denoising step for few rows, in 2 depth + 1 launches: there, launching and reading weights is what takes the time.

1. Per block, SiLU(Linear(modulated LayerNorm(h))): every program normalises the few rows anew and multiplies them by its share of
   the weights.
2. Per block, h + gate Linear(.).
3. Once, a program per row: output layer of both halves (of the unconditional one no variance), guidance, update of x, and the input
   layer of the next step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from continuar.heads.mlp import LN_EPS, Block, DenoisingMLP

MOST_ROWS = 16
"""G R up to which this is used: one tile of a matrix unit."""
_N, _K = 16, 256


@triton.jit
def _norm_linear_silu(
    h_ptr, norm_weight_ptr, norm_bias_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr,
    rows, h_rows, modulation_stride, eps,
    width: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    here, there = m < rows, n < width
    h_at = (m % h_rows)[:, None] * width + k[None, :]
    total = tl.zeros((M,), tl.float32)
    for first in range(0, width, K):
        inside = here[:, None] & (first + k < width)[None, :]
        total += tl.sum(tl.load(h_ptr + h_at + first, inside, 0.0), 1)
    mean = total / width
    square = tl.zeros((M,), tl.float32)
    for first in range(0, width, K):
        inside = here[:, None] & (first + k < width)[None, :]
        centred = tl.where(inside, tl.load(h_ptr + h_at + first, inside, 0.0) - mean[:, None], 0.0)
        square += tl.sum(centred * centred, 1)
    inverse = 1.0 / tl.sqrt(square / width + eps)
    y = tl.zeros((M, N), tl.float32)
    modulation_at = m[:, None] * modulation_stride + k[None, :]
    for first in range(0, width, K):
        within = first + k < width
        inside = here[:, None] & within[None, :]
        x = (tl.load(h_ptr + h_at + first, inside, 0.0) - mean[:, None]) * inverse[:, None]
        norm_weight = tl.load(norm_weight_ptr + first + k, within, 0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + first + k, within, 0.0).to(tl.float32)
        scale = tl.load(scale_ptr + modulation_at + first, inside, 0.0).to(tl.float32)
        shift = tl.load(shift_ptr + modulation_at + first, inside, 0.0).to(tl.float32)
        x = (x * norm_weight[None, :] + norm_bias[None, :]) * (1.0 + scale) + shift
        both = there[None, :] & within[:, None]
        weight = tl.load(weight_ptr + n[None, :] * width + (first + k)[:, None], both, 0.0)
        y = tl.dot(tl.where(inside, x, 0.0).to(weight.dtype), weight, y, input_precision=PRECISION)
    y += tl.load(bias_ptr + n, there, 0.0).to(tl.float32)[None, :]
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + m[:, None] * width + n[None, :], y.to(out_ptr.dtype.element_ty), here[:, None] & there[None, :])


@triton.jit
def _linear_gate(
    x_ptr, weight_ptr, bias_ptr, gate_ptr, h_ptr, out_ptr,
    rows, h_rows, modulation_stride,
    width: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    here, there = m < rows, n < width
    y = tl.zeros((M, N), tl.float32)
    for first in range(0, width, K):
        within = first + k < width
        x = tl.load(x_ptr + m[:, None] * width + (first + k)[None, :], here[:, None] & within[None, :], 0.0)
        weight = tl.load(weight_ptr + n[None, :] * width + (first + k)[:, None], there[None, :] & within[:, None], 0.0)
        y = tl.dot(x, weight, y, input_precision=PRECISION)
    y += tl.load(bias_ptr + n, there, 0.0).to(tl.float32)[None, :]
    inside = here[:, None] & there[None, :]
    gate = tl.load(gate_ptr + m[:, None] * modulation_stride + n[None, :], inside, 0.0).to(tl.float32)
    h = tl.load(h_ptr + (m % h_rows)[:, None] * width + n[None, :], inside, 0.0)
    tl.store(out_ptr + m[:, None] * width + n[None, :], h + gate * y, inside)


@triton.jit
def _moments(h_ptr, eps, width: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(h_ptr + column, inside, 0.0)
    mean = tl.sum(h, 0) / width
    centred = tl.where(inside, h - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)


@triton.jit
def _modulated(h_ptr, shift_ptr, scale_ptr, mean, inverse, column, inside):
    scale = tl.load(scale_ptr + column, inside, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, inside, 0.0).to(tl.float32)
    return tl.where(inside, (tl.load(h_ptr + column, inside, 0.0) - mean) * inverse * (1.0 + scale) + shift, 0.0)


@triton.jit
def _finish(
    h_ptr, shift_ptr, scale_ptr, out_weight_ptr, out_bias_ptr, in_weight_ptr, in_bias_ptr, x_ptr, noise_ptr, guidance_ptr,
    x_next_ptr, h_next_ptr, a, b, c, rows, modulation_stride, dim, eps,
    width: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d, k = tl.arange(0, D), tl.arange(0, K)
    exists = d < dim
    h_at, shift_at, scale_at = h_ptr + row * width, shift_ptr + row * modulation_stride, scale_ptr + row * modulation_stride
    mean, inverse = _moments(h_at, eps, width, BLOCK)
    out, v = tl.zeros((D, K), tl.float32), tl.zeros((D, K), tl.float32)
    for first in range(0, width, K):
        within = first + k < width
        n = _modulated(h_at, shift_at, scale_at, mean, inverse, first + k, within)
        at, both = d[:, None] * width + (first + k)[None, :], exists[:, None] & within[None, :]
        out += tl.load(out_weight_ptr + at, both, 0.0) * n[None, :]
        v += tl.load(out_weight_ptr + dim * width + at, both, 0.0) * n[None, :]
    bias = tl.load(out_bias_ptr + d, exists, 0.0)
    prediction = tl.sum(out, 1) + bias
    v_row = tl.sum(v, 1) + tl.load(out_bias_ptr + dim + d, exists, 0.0)
    if GUIDED:
        h_at += rows * width
        shift_at += rows * modulation_stride
        scale_at += rows * modulation_stride
        mean, inverse = _moments(h_at, eps, width, BLOCK)
        out = tl.zeros((D, K), tl.float32)
        for first in range(0, width, K):
            within = first + k < width
            n = _modulated(h_at, shift_at, scale_at, mean, inverse, first + k, within)
            at, both = d[:, None] * width + (first + k)[None, :], exists[:, None] & within[None, :]
            out += tl.load(out_weight_ptr + at, both, 0.0) * n[None, :]
        unconditional = tl.sum(out, 1) + bias
        prediction = unconditional + tl.load(guidance_ptr) * (prediction - unconditional)
    x = tl.load(x_ptr + row * dim + d, exists, 0.0)
    noise = tl.load(noise_ptr + row * dim + d, exists, 0.0)
    x = tl.where(exists, a * x + b * prediction + tl.exp(c * v_row) * noise, 0.0)
    tl.store(x_next_ptr + row * dim + d, x, exists)
    for first in range(0, width, K):
        within = first + k < width
        at, both = (first + k)[:, None] * dim + d[None, :], within[:, None] & exists[None, :]
        h = tl.sum(tl.load(in_weight_ptr + at, both, 0.0) * x[None, :], 1) + tl.load(in_bias_ptr + first + k, within, 0.0)
        tl.store(h_next_ptr + row * width + first + k, h, within)


def small_step(
    net: DenoisingMLP,
    exact: DenoisingMLP,
    x: Tensor,
    h: Tensor,
    modulation_GRM: Tensor,
    guidance: Tensor,
    noise: Tensor,
    a: float,
    b: float,
    c: float,
) -> tuple[Tensor, Tensor]:
    """One ancestral step, `fast_head.denoise` and `Kernels.update` in one: (x [R, D], h [1, R, W]), where h is ``exact.input(x)``.

    Args:
        x, h: as the last step returned them.
        modulation_GRM: contiguous. noise: [R, D].
    """
    copies, rows, _ = modulation_GRM.shape
    width, total = net.width, copies * rows
    assert total <= MOST_ROWS
    assert all(tensor.is_contiguous() for tensor in (x, h, modulation_GRM, noise))
    part = modulation_GRM.unflatten(-1, (-1, width)).unbind(-2)
    stride, grid = modulation_GRM.shape[-1], (triton.cdiv(width, _N),)
    options = {"width": width, "PRECISION": "ieee", "M": MOST_ROWS, "N": _N, "K": _K}
    for i, block in enumerate(cast(Iterable[Block], net.blocks)):
        shift, scale, gate = part[3 * i : 3 * i + 3]
        first, second = block.mlp[0], block.mlp[2]
        hidden = torch.empty(total, width, dtype=shift.dtype, device=h.device)
        h_rows = h.shape[0] * h.shape[1]
        _norm_linear_silu[grid](
            h, block.norm.weight, block.norm.bias, shift, scale, first.weight, first.bias, hidden,
            total, h_rows, stride, LN_EPS, **options,
        )  # fmt: skip
        after = torch.empty(copies, rows, width, device=h.device)
        _linear_gate[grid](hidden, second.weight, second.bias, gate, h, after, total, h_rows, stride, **options)
        h = after
    x_next, h_next, dim = torch.empty_like(x), torch.empty(1, rows, width, device=h.device), x.shape[-1]
    _finish[(rows,)](
        h, part[-2], part[-1], exact.output.weight, exact.output.bias, exact.input.weight, exact.input.bias, x, noise, guidance,
        x_next, h_next, a, b, c, rows, stride, dim, LN_EPS,
        width=width, GUIDED=copies == 2, BLOCK=triton.next_power_of_2(width), D=triton.next_power_of_2(dim), K=_K // 2, num_warps=8,
    )  # fmt: skip
    return x_next, h_next
