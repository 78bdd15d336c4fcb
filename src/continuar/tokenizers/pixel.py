"""Pixels as tokens: p x p patches, scaled to unit standard deviation (paper, Appendix: pixels of ImageNet 64 as 4x4 patches)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from continuar.errors import require
from continuar.tokenizers.base import Tokenizer, TokenSpec, check_patches, patchify, pixels_of, unpatchify


@dataclass(frozen=True)
class PixelConfig:
    """Square images cut into patches; no learned part."""

    kind: Literal["pixel"] = "pixel"
    image_size: int = 32
    """Side of the image in pixels; must be divisible by the patch."""
    patch: int = 4
    """Side of a patch in pixels."""
    channels: Literal[1, 3] = 3
    """3 for colour; 1 keeps the mean of the channels."""
    std: float = 0.0
    """Standard deviation of pixels in [-1, 1]; tokens are divided by it. 0: measured on the training images."""

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        require(0 <= self.std < float("inf"), f"tokenizer.std is {self.std}; allowed: above 0, or 0 to measure it")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        side = self.image_size // self.patch
        return TokenSpec((side, side), self.channels * self.patch**2)

    def build(self) -> PixelTokenizer:
        """The tokenizer; its std must be known by now."""
        return PixelTokenizer(self)


class PixelTokenizer(Tokenizer):
    """See `PixelConfig`. Latents are the unscaled pixels [B, channels, H, W]."""

    def __init__(self, config: PixelConfig) -> None:
        super().__init__()
        require(config.std > 0, "tokenizer.std is 0: measure it on the training images, or give it")
        self.config, self.spec = config, config.spec

    def encode(self, images_B3HW: Tensor) -> Tensor:
        return pixels_of(images_B3HW, self.config.image_size, self.config.channels)

    def tokenize(self, latents: Tensor) -> Tensor:
        return patchify(latents, self.config.patch) / self.config.std

    def decode(self, tokens: Tensor) -> Tensor:
        pixels = unpatchify(tokens * self.config.std, self.config.patch, self.spec.grid)
        return pixels.clamp(-1, 1).expand(-1, 3, -1, -1)
