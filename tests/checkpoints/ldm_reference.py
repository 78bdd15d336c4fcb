"""The autoencoder of latent diffusion (Rombach et al. 2022) written down on its own: functions of a state dict in its key layout.

`tests/golden` shows that it agrees with vectors made by the public implementations; the tests use it at other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Tiny by default: the group norms of this layout have 32 groups, so widths are multiples of 32."""

    widths: tuple[int, ...] = (32, 64)
    layers: int = 1
    latent: int = 4
    codes: int = 0
    """0: KL."""
    embed: int = 4
    encoder_attention: tuple[int, ...] = ()
    """Stages, full resolution first."""
    decoder_attention: tuple[int, ...] = ()


def random_state(s: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Every key of the layout with random values."""
    state: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, side: int = 3) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (outputs, inputs, side, side), (outputs,)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (width,), (width,)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    last = s.widths[-1]
    for half in ("encoder", "decoder"):
        resnet(f"{half}.mid.block_1", last, last)
        attention(f"{half}.mid.attn_1", last)
        resnet(f"{half}.mid.block_2", last, last)
    conv("encoder.conv_in", 3, s.widths[0])
    width = s.widths[0]
    for i, wider in enumerate(s.widths):
        for j in range(s.layers):
            resnet(f"encoder.down.{i}.block.{j}", width, wider)
            width = wider
            if i in s.encoder_attention:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < len(s.widths) - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    norm("encoder.norm_out", last)
    conv("encoder.conv_out", last, s.latent if s.codes else 2 * s.latent)
    conv("decoder.conv_in", s.latent, last)
    for i in reversed(range(len(s.widths))):
        for j in range(s.layers + 1):
            resnet(f"decoder.up.{i}.block.{j}", width, s.widths[i])
            width = s.widths[i]
            if i in s.decoder_attention:
                attention(f"decoder.up.{i}.attn.{j}", width)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", s.widths[0])
    conv("decoder.conv_out", s.widths[0], 3)
    embed = s.embed if s.codes else s.latent
    conv("quant_conv", s.latent if s.codes else 2 * s.latent, embed if s.codes else 2 * embed, 1)
    conv("post_quant_conv", embed, s.latent, 1)
    if s.codes:
        state["quantize.embedding.weight"] = (s.codes, embed)
    generator = torch.Generator().manual_seed(seed)
    return {k: _values(k, shape, generator).to(dtype) for k, shape in state.items()}


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if ".norm" in name:
        return (1 + 0.1 * x) if name.endswith("weight") else 0.1 * x
    return x / (x[0].numel() ** 0.5) if x.ndim > 1 else 0.1 * x


def encode(w: State, x: Tensor) -> Tensor:
    """Moments [B, 2C, h, w] (KL), or the vectors before quantisation (VQ)."""
    h = _conv(w, "encoder.conv_in", x)
    i = 0
    while f"encoder.down.{i}.block.0.conv1.weight" in w:
        h = _stage(w, f"encoder.down.{i}", h)
        if f"encoder.down.{i}.downsample.conv.weight" in w:
            h = _conv(w, f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        i += 1
    h = _conv(w, "encoder.conv_out", F.silu(_norm(w, "encoder.norm_out", _mid(w, "encoder", h))))
    return _conv(w, "quant_conv", h)


def decode(w: State, z: Tensor) -> Tensor:
    """Images of latents (KL) or of codes (VQ)."""
    h = _mid(w, "decoder", _conv(w, "decoder.conv_in", _conv(w, "post_quant_conv", z)))
    for i in reversed(range(sum(k.startswith("decoder.up.") and k.endswith("block.0.norm1.bias") for k in w))):
        h = _stage(w, f"decoder.up.{i}", h)
        if f"decoder.up.{i}.upsample.conv.weight" in w:
            h = _conv(w, f"decoder.up.{i}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return _conv(w, "decoder.conv_out", F.silu(_norm(w, "decoder.norm_out", h)))


def quantise(w: State, z: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [B, N], codes [B, C, h, w])"""
    book = w["quantize.embedding.weight"]
    distance = (z.permute(0, 2, 3, 1).unsqueeze(-2) - book).square().sum(-1)
    ids = distance.argmin(-1)
    return ids.flatten(1), book[ids].permute(0, 3, 1, 2)


def _stage(w: State, name: str, h: Tensor) -> Tensor:
    j = 0
    while f"{name}.block.{j}.conv1.weight" in w:
        h = _resnet(w, f"{name}.block.{j}", h)
        if f"{name}.attn.{j}.q.weight" in w:
            h = _attention(w, f"{name}.attn.{j}", h)
        j += 1
    return h


def _mid(w: State, half: str, h: Tensor) -> Tensor:
    h = _attention(w, f"{half}.mid.attn_1", _resnet(w, f"{half}.mid.block_1", h))
    return _resnet(w, f"{half}.mid.block_2", h)


def _resnet(w: State, name: str, x: Tensor) -> Tensor:
    h = _conv(w, f"{name}.conv1", F.silu(_norm(w, f"{name}.norm1", x)))
    h = _conv(w, f"{name}.conv2", F.silu(_norm(w, f"{name}.norm2", h)))
    return h + (_conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def _attention(w: State, name: str, x: Tensor) -> Tensor:
    h = _norm(w, f"{name}.norm", x)
    q, k, v = (_conv(w, f"{name}.{part}", h).flatten(2) for part in "qkv")
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    return x + _conv(w, f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))


def _norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _conv(w: State, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride, weight.shape[-1] // 2 if padding is None else padding)
