"""The official MAR layout written down on its own, with state dicts and files made from it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What the official constructor is told; tiny by default."""

    width: int = 8
    depth: int = 2
    heads: int = 2
    decoder_width: int = 8
    decoder_depth: int = 1
    decoder_heads: int = 2
    side: int = 2
    patch: int = 1
    channels: int = 16
    stride: int = 16
    classes: int = 3
    buffer: int = 4
    head_width: int = 6
    head_depth: int = 2

    @property
    def token_dim(self) -> int:
        return self.channels * self.patch**2


BASE = Sizes(768, 12, 12, 768, 12, 12, 16, classes=1000, buffer=64, head_width=1024, head_depth=6)
LARGE = Sizes(1024, 16, 16, 1024, 16, 16, 16, classes=1000, buffer=64, head_width=1280, head_depth=8)
HUGE = Sizes(1280, 20, 16, 1280, 20, 16, 16, classes=1000, buffer=64, head_width=1536, head_depth=12)
UNLIKE = Sizes(width=64, heads=4, decoder_width=32, decoder_depth=3, side=3, patch=2, channels=4, stride=8)
"""Other widths, other heads, 2 x 2 latents to a token."""


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
    shapes |= linear(f"{name}.attn.qkv", width, 3 * width) | linear(f"{name}.attn.proj", width, width)
    return shapes | linear(f"{name}.mlp.fc1", width, 4 * width) | linear(f"{name}.mlp.fc2", 4 * width, width)


def head(s: Sizes) -> dict[str, tuple[int, ...]]:
    w, net = s.head_width, "diffloss.net."
    shapes = linear(net + "time_embed.mlp.0", 256, w) | linear(net + "time_embed.mlp.2", w, w)
    shapes |= linear(net + "cond_embed", s.decoder_width, w) | linear(net + "input_proj", s.token_dim, w)
    for i in range(s.head_depth):
        part = f"{net}res_blocks.{i}."
        shapes |= norm(part + "in_ln", w) | linear(part + "mlp.0", w, w) | linear(part + "mlp.2", w, w)
        shapes |= linear(part + "adaLN_modulation.1", w, 3 * w)
    shapes |= linear(net + "final_layer.linear", w, 2 * s.token_dim)
    return shapes | linear(net + "final_layer.adaLN_modulation.1", w, 2 * w)


def shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Every official key and its shape."""
    positions, e, d = s.side**2, s.width, s.decoder_width
    result: dict[str, tuple[int, ...]] = {
        "fake_latent": (1, e),
        "encoder_pos_embed_learned": (1, positions + s.buffer, e),
        "mask_token": (1, 1, d),
        "decoder_pos_embed_learned": (1, positions + s.buffer, d),
        "diffusion_pos_embed_learned": (1, positions, d),
        "class_emb.weight": (s.classes, e),
    }
    result |= linear("z_proj", s.token_dim, e) | norm("z_proj_ln", e) | norm("encoder_norm", e)
    result |= linear("decoder_embed", e, d) | norm("decoder_norm", d) | head(s)
    for i in range(s.depth):
        result |= block(f"encoder_blocks.{i}", e)
    for i in range(s.decoder_depth):
        result |= block(f"decoder_blocks.{i}", d)
    return result


def state(s: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random bits, so that infinities and every kind of NaN are among them."""
    generator = torch.Generator().manual_seed(seed)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    return {k: torch.randint(low, high, shape, generator=generator, dtype=integer).view(dtype) for k, shape in shapes(s).items()}


def meta_state(s: Sizes) -> dict[str, Tensor]:
    """Shapes without values, for models that are too large for a test."""
    return {k: torch.empty(shape, device="meta") for k, shape in shapes(s).items()}


def args(s: Sizes, **others: object) -> argparse.Namespace:
    """What official training keeps in its files, as far as it is read here, and some that is not."""
    values: dict[str, object] = {
        "img_size": s.side * s.patch * s.stride,
        "vae_stride": s.stride,
        "patch_size": s.patch,
        "vae_embed_dim": s.channels,
        "class_num": s.classes,
        "buffer_size": s.buffer,
        "diffloss_w": s.head_width,
        "diffloss_d": s.head_depth,
        "encoder_num_heads": s.heads,
        "decoder_num_heads": s.decoder_heads,
        "blr": 1e-4,
        "lr": None,
        "vae_path": "kl16.ckpt",
        "dist_on_itp": False,
    }
    return argparse.Namespace(**(values | others))


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same keys, dtypes, shapes and bits (NaNs compare by their bits)."""
    assert found.keys() == expected.keys()
    for k, v in expected.items():
        assert (found[k].dtype, found[k].shape) == (v.dtype, v.shape), k
        assert torch.equal(found[k].flatten().view(torch.uint8), v.flatten().view(torch.uint8)), k
