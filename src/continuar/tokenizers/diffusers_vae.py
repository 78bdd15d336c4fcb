"""Continuous tokens from any autoencoder of diffusers.

1. ``encode``: images -> posterior moments [B, 2C, h, w], or latents [B, C, h, w] where the encoder is deterministic. A cache keeps
   these, so that the posterior is drawn anew at every use.
2. ``tokenize``: draw from the posterior, subtract the shift, multiply by the scale, merge p x p latents into one token.
3. ``decode``: the same backwards, then the decoder.

The scale is 1/std of the latents over the training set (paper, Section 4: KL-16 x 0.2325); this config is its only home.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from continuar.errors import UserError, require
from continuar.tokenizers.base import Tokenizer, TokenSpec, patchify, unpatchify
from continuar.tokenizers.networks import KLNetwork, NetworkConfig

NO_WEIGHTS = "the autoencoder has random weights; `continuar cache DATA TOKENIZER DST` keeps latents of a trained one, to train on"
NO_SCALE = "the tokenizer has no scale yet: `continuar tokenizer stats TOKENIZER DATA` measures it, or give --scale"


@dataclass(frozen=True)
class VAEConfig:
    """Square images as continuous latents of an autoencoder."""

    kind: Literal["vae"] = "vae"
    network: NetworkConfig = field(default_factory=KLNetwork)
    """The autoencoder's architecture; its weights are saved beside the config."""
    image_size: int = 256
    """Side of the image in pixels; must be divisible by stride x patch."""
    patch: int = 1
    """Side of the square of latents that makes one token (paper: 2 for KL-8)."""
    scale: float = 0.0
    """Multiplies latents to unit std: 1/std over the training set. 0: not measured yet."""
    shift: float = 0.0
    """Subtracted from latents before scaling. The paper has none; some 16-channel autoencoders do."""

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.network.stride, self.patch)
        require(0 <= self.scale < math.inf, f"tokenizer.scale is {self.scale}; allowed: above 0, or 0 if not measured yet")
        require(math.isfinite(self.shift), f"tokenizer.shift is {self.shift}; allowed: any finite number")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        side = self.image_size // (self.network.stride * self.patch)
        return TokenSpec((side, side), self.network.channels * self.patch**2)

    def build(self) -> VAETokenizer:
        """The tokenizer, with random weights."""
        return VAETokenizer(self)


def check_image_size(size: int, stride: int, patch: int = 1) -> None:
    """Refuses an image size that latents do not tile."""
    require(patch >= 1, f"tokenizer.patch is {patch}; allowed: 1 or more")
    step = stride * patch
    require(
        size >= step and size % step == 0,
        f"image size {size} is not divisible by stride x patch = {stride} x {patch} = {step}; "
        f"nearest allowed: {max(1, size // step) * step} or {(size // step + 1) * step}",
    )


def check_images(images_B3HW: Tensor, size: int) -> None:
    """Refuses images of another shape than [B, 3, size, size]."""
    fits = images_B3HW.shape[1:] == (3, size, size)
    require(fits, f"images are {tuple(images_B3HW.shape)}; allowed: [B, 3, {size}, {size}]")


def posterior(moments_B2Chw: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) [B, C, h, w] of a Gaussian posterior; log variances are clamped to -30..20 as in LDM."""
    mean, log_variance = moments_B2Chw.float().chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()


class VAETokenizer(Tokenizer):
    """See the module's docstring.

    Attributes:
        network: the diffusers model, frozen, in evaluation mode; ``network.save_pretrained(DIR)`` writes it for diffusers.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec
        self.network = config.network.build()
        self.eval().requires_grad_(False)

    def fit(self, images_n3HW: Tensor) -> None:
        raise UserError(NO_WEIGHTS)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        check_images(images_B3HW, self.config.image_size)
        return self.config.network.encode(self.network, images_B3HW)

    def encoding_state(self) -> dict[str, Tensor]:
        parts = tuple(f"network.{name}." for name in self.config.network.encoder_parts)
        return {k: v for k, v in self.state_dict().items() if k.startswith(parts)}

    def tokenize(self, latents: Tensor) -> Tensor:
        require(self.config.scale > 0, NO_SCALE)
        if self.config.network.has_variance:
            mean, std = posterior(latents)
            x = mean + std * torch.randn_like(mean)
        else:
            x = latents.float()
        return patchify((x - self.config.shift) * self.config.scale, self.config.patch)

    def latents(self, tokens_BND: Tensor) -> Tensor:
        """Tokens back to the autoencoder's latents [B, C, h, w]."""
        require(self.config.scale > 0, NO_SCALE)
        return unpatchify(tokens_BND / self.config.scale, self.config.patch, self.spec.grid) + self.config.shift

    def decode(self, tokens: Tensor) -> Tensor:
        return self.config.network.decode(self.network, self.latents(tokens)).clamp(-1, 1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        x = posterior(latents)[0] if self.config.network.has_variance else latents.float()
        return self.config.network.decode(self.network, x).clamp(-1, 1)
