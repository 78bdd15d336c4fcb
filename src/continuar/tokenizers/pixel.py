"""Pixels as tokens: p x p patches, scaled to unit standard deviation (paper, Appendix: pixels of ImageNet 64 as 4x4 patches).

Also the conversions that all tokenizers share: uint8 pixels <-> [-1, 1], and images <-> sequences of patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from continuar.errors import require
from continuar.tokenizers.base import Tokenizer, TokenSpec, check_images


def to_signed(pixels_BHW3: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> floats [B, 3, H, W] in [-1, 1]."""
    return pixels_BHW3.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(images_B3HW: Tensor) -> Tensor:
    """[-1, 1] floats [B, 3, H, W] -> uint8 [B, H, W, 3], rounded to nearest."""
    return ((images_B3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/p)(W/p), C p p], raster order; channels of a token are ordered (c, row, column)."""
    b, c, h, w = x_BCHW.shape
    x = x_BCHW.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(x_BND: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, h w, C p p] -> [B, C, h p, w p]."""
    b, _, d = x_BND.shape
    h, w = grid
    x = x_BND.reshape(b, h, w, d // patch**2, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, d // patch**2, h * patch, w * patch)


@dataclass(frozen=True)
class PatchConfig:
    """Square images cut into square patches of pixels."""

    image_size: int = 32
    """Side of the image in pixels; must be divisible by the patch."""
    patch: int = 4
    """Side of a patch in pixels."""
    channels: Literal[1, 3] = 3
    """3 for colour; 1 keeps the mean of the channels."""

    def __post_init__(self) -> None:
        size, patch = self.image_size, self.patch
        require(size >= 1 and patch >= 1, f"image size {size}, patch {patch}: 1 or more each")
        require(
            size % patch == 0,
            f"image size {size} is not divisible by the patch {patch}; allowed patches: "
            + ", ".join(str(p) for p in range(1, size + 1) if size % p == 0),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        side = self.image_size // self.patch
        return side, side

    def pixels(self, images_B3HW: Tensor) -> Tensor:
        """Images as [B, channels, H, W].

        Raises:
            UserError: images of another shape than [B, 3, image_size, image_size].
        """
        check_images(images_B3HW, self.image_size)
        return images_B3HW if self.channels == 3 else images_B3HW.mean(1, keepdim=True)


@dataclass(frozen=True)
class PixelConfig(PatchConfig):
    """Square images cut into patches; no learned part."""

    kind: Literal["pixel"] = "pixel"
    std: float = 0.0
    """Standard deviation of pixels in [-1, 1]; tokens are divided by it. 0: measured on the training images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.std < float("inf"), f"tokenizer.std is {self.std}; allowed: above 0, or 0 to measure it")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        return TokenSpec(self.grid, self.channels * self.patch**2)

    def build(self) -> PixelTokenizer:
        """The tokenizer; its std must be known by now."""
        return PixelTokenizer(self)


class PixelTokenizer(Tokenizer):
    """Patches of pixels divided by their standard deviation. Latents are the unscaled pixels [B, channels, H, W]."""

    def __init__(self, config: PixelConfig) -> None:
        require(config.std > 0, "tokenizer.std is 0: measure it on the training images, or give it")
        super().__init__(config)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        return self.config.pixels(images_B3HW)

    def tokenize(self, latents: Tensor) -> Tensor:
        return patchify(latents, self.config.patch) / self.config.std

    def decode(self, tokens: Tensor) -> Tensor:
        pixels = unpatchify(tokens * self.config.std, self.config.patch, self.spec.grid)
        return pixels.clamp(-1, 1).expand(-1, 3, -1, -1)
