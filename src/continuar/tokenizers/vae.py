"""Continuous tokens from the latents of an autoencoder.

1. ``encode``: images -> posterior moments [B, 2C, h, w], or latents [B, C, h, w] if the encoder is deterministic. A cache keeps
   these, so that the posterior is drawn anew at every use.
2. ``tokenize``: draw from the posterior, subtract the shift, multiply by the scale, merge p x p latents into one token.
3. ``decode``: the same backwards, then the decoder.

The scale is 1/std of the latents over the training set (paper, Section 4: KL-16 x 0.2325); the config is its only home.

`VAETokenizer` has the autoencoder, a network of diffusers. `LatentTokenizer` has the shape and scale of its tokens only: models
converted from the official checkpoints, and the ImageNet recipes, take such tokens.

`NAMED` holds the tokenizers of the paper's Table 2 (Li et al., NeurIPS 2024), for images of 256 x 256:

| name | what | rFID there |
|---|---|---|
| vq16 | LDM's vq-f16, vectors before quantisation | 5.87 |
| kl16 | LDM's kl-f16 | 1.43 |
| kl8 | LDM's kl-f8, 2 x 2 latents merged | 1.20 |
| consistency | the consistency decoder on latents of kl8, 2 x 2 merged | 1.30 |
| kl16_mar | the paper's own KL-16: no attention in the decoder's upsampling path | 1.22 |

They are architectures; weights come from files. A scale of 0 is not known and must be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from continuar.errors import UserError, require, unknown_name
from continuar.tokenizers.base import Tokenizer, TokenSpec, check_images
from continuar.tokenizers.networks import ConsistencyNetwork, DownBlock, KLNetwork, NetworkConfig, UpBlock, VQNetwork
from continuar.tokenizers.pixel import patchify, unpatchify


@dataclass(frozen=True)
class LatentConfig:
    """Latents [channels, image_size / stride, image_size / stride] of an external autoencoder."""

    kind: Literal["latent"] = "latent"
    autoencoder: str = "kl16"
    """Name of the autoencoder, shown in messages."""
    image_size: int = 256
    """Side of the image in pixels."""
    stride: int = 16
    """Pixels per latent."""
    channels: int = 16
    """Channels of the latent."""
    patch: int = 1
    """Side of the square of latents that makes one token (KL-8: 2)."""
    scale: float = 0.2325
    """Factor that gives latents unit std: 1/std over the training set. The paper's KL-16 on ImageNet has 0.2325."""

    def __post_init__(self) -> None:
        for name in ("stride", "channels"):
            require(getattr(self, name) >= 1, f"tokenizer.{name} is {getattr(self, name)}; allowed: 1 or more")
        check_image_size(self.image_size, self.stride, self.patch)
        require(0 < self.scale < math.inf, f"tokenizer.scale is {self.scale}; allowed: above 0")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        side = self.image_size // (self.stride * self.patch)
        return TokenSpec((side, side), self.channels * self.patch**2)

    def build(self) -> LatentTokenizer:
        """The tokenizer."""
        return LatentTokenizer(self)


class LatentTokenizer(Tokenizer):
    """Tokens of latents without the autoencoder: `encode` and `decode` raise a UserError that names it."""

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
    """Factor that gives latents unit std: 1/std over the training set. 0: not measured yet."""
    shift: float = 0.0
    """Subtracted from latents before scaling. The paper's autoencoders have none; some with 16 channels do."""

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


def posterior(moments_B2Chw: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) [B, C, h, w] of a Gaussian posterior; log variances are clamped to -30..20 as in LDM."""
    mean, log_variance = moments_B2Chw.float().chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()


class NetworkTokenizer(Tokenizer):
    """A tokenizer with an autoencoder of diffusers.

    Attributes:
        network: the diffusers model, frozen, in evaluation mode; ``network.save_pretrained(DIR)`` writes it for diffusers.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.network: Any = config.network.build()
        self.eval().requires_grad_(False)

    def fit(self, images_n3HW: Tensor) -> None:
        raise UserError(
            "the autoencoder has random weights; `continuar cache DATA TOKENIZER DST` keeps latents of a trained one, to train on"
        )

    def encode(self, images_B3HW: Tensor) -> Tensor:
        check_images(images_B3HW, self.config.image_size)
        return self.config.network.encode(self.network, images_B3HW)

    def encoding_state(self) -> dict[str, Tensor]:
        parts = tuple(f"network.{name}." for name in self.config.network.encoder_parts)
        return {k: v for k, v in self.state_dict().items() if k.startswith(parts)}


class VAETokenizer(NetworkTokenizer):
    """Vectors from the posterior, or from a deterministic encoder."""

    def tokenize(self, latents: Tensor) -> Tensor:
        require(self.config.scale > 0, NO_SCALE)
        x = latents.float()
        if self.config.network.has_variance:
            mean, std = posterior(latents)
            x = mean + std * torch.randn_like(mean)
        return patchify((x - self.config.shift) * self.config.scale, self.config.patch)

    def latents(self, tokens_BND: Tensor) -> Tensor:
        """Tokens back to the autoencoder's latents [B, C, h, w]."""
        require(self.config.scale > 0, NO_SCALE)
        return unpatchify(tokens_BND / self.config.scale, self.config.patch, self.spec.grid) + self.config.shift

    def decode(self, tokens: Tensor) -> Tensor:
        return self.config.network.decode(self.network, self.latents(tokens)).clamp(-1, 1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        # Without tokens between, because a tokenizer that has no scale yet must be measurable too.
        x = posterior(latents)[0] if self.config.network.has_variance else latents.float()
        return self.config.network.decode(self.network, x).clamp(-1, 1)


_DOWN: tuple[DownBlock, ...] = ("DownEncoderBlock2D",) * 4
_UP: tuple[UpBlock, ...] = ("UpDecoderBlock2D",) * 4
_F16 = (128, 128, 256, 256, 512)

KL16_LDM = KLNetwork(
    latent_channels=16,
    down_block_types=(*_DOWN, "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", *_UP),
    block_out_channels=_F16,
    layers_per_block=2,
)
KL16_MAR = replace(KL16_LDM, up_block_types=("UpDecoderBlock2D", *_UP))
KL8_LDM = KLNetwork(
    latent_channels=4,
    down_block_types=_DOWN,
    up_block_types=_UP,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
VQ16_LDM = VQNetwork(
    latent_channels=8,
    down_block_types=KL16_LDM.down_block_types,
    up_block_types=KL16_LDM.up_block_types,
    block_out_channels=_F16,
    layers_per_block=2,
    num_vq_embeddings=16384,
    vq_embed_dim=8,
)
CONSISTENCY = ConsistencyNetwork({"latent_channels": 4, "encoder_block_out_channels": [128, 256, 512, 512]})
# The scale of Stable Diffusion's autoencoder, which has the architecture of kl8 (Rombach et al. 2022).
_KL8_SCALE = 0.18215

NAMED: dict[str, VAEConfig] = {
    "vq16": VAEConfig(network=VQ16_LDM),
    "kl16": VAEConfig(network=KL16_LDM),
    "kl8": VAEConfig(network=KL8_LDM, patch=2, scale=_KL8_SCALE),
    "consistency": VAEConfig(network=CONSISTENCY, patch=2, scale=_KL8_SCALE),
    "kl16_mar": VAEConfig(network=KL16_MAR, scale=LatentConfig.scale),
}


def named_tokenizer(name: str) -> VAEConfig:
    """The config of that name.

    Raises:
        UserError: unknown; the nearest names are suggested.
    """
    if name not in NAMED:
        raise unknown_name("tokenizer", name, NAMED)
    return NAMED[name]
