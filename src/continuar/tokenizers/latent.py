"""Latents of an autoencoder that is kept elsewhere: the shape and scale of its tokens, without its network.

Models converted from the official checkpoints, and the ImageNet recipes, see tokens of this kind. Tokens are
``latents * scale``, with 2-D latents cut into patches; ``decode`` needs the autoencoder itself and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from continuar.errors import UserError, require
from continuar.tokenizers.base import Tokenizer, TokenSpec, patchify, unpatchify


@dataclass(frozen=True)
class LatentConfig:
    """Latents [channels, image_size / stride, image_size / stride] of an external autoencoder."""

    kind: Literal["latent"] = "latent"
    autoencoder: str = "kl16"
    """Its name, for people."""
    image_size: int = 256
    """Side of the image in pixels."""
    stride: int = 16
    """Pixels per latent."""
    channels: int = 16
    """Channels of the latent."""
    patch: int = 1
    """Side of the square of latents that makes one token (KL-8: 2)."""
    scale: float = 0.2325
    """Multiplies latents to unit std: 1/std over the training set. 0.2325 is that of the paper's KL-16 on ImageNet."""

    def __post_init__(self) -> None:
        for name in ("image_size", "stride", "channels", "patch"):
            require(getattr(self, name) >= 1, f"tokenizer.{name} is {getattr(self, name)}; allowed: 1 or more")
        step = self.stride * self.patch
        require(self.image_size % step == 0, f"image size {self.image_size} is not divisible by stride x patch = {step}")
        require(0 < self.scale < float("inf"), f"tokenizer.scale is {self.scale}; allowed: above 0")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        side = self.image_size // (self.stride * self.patch)
        return TokenSpec((side, side), self.channels * self.patch**2)

    def build(self) -> LatentTokenizer:
        """The tokenizer."""
        return LatentTokenizer(self)


class LatentTokenizer(Tokenizer):
    """See the module's docstring."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec

    def encode(self, images_B3HW: Tensor) -> Tensor:
        raise UserError(f"encoding images needs the autoencoder '{self.config.autoencoder}', which is not part of this model")

    def tokenize(self, latents: Tensor) -> Tensor:
        return patchify(latents, self.config.patch) * self.config.scale

    def latents(self, tokens_BND: Tensor) -> Tensor:
        """Tokens back to the autoencoder's latents [B, C, h, w]."""
        return unpatchify(tokens_BND / self.config.scale, self.config.patch, self.spec.grid)

    def decode(self, tokens: Tensor) -> Tensor:
        raise UserError(
            f"images need the autoencoder '{self.config.autoencoder}', which is not part of this model; give it "
            "(`continuar sample --tokenizer`), or take `pipe.tokens(...)` and decode `pipe.tokenizer.latents(tokens)` with it"
        )
