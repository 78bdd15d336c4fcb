"""Ids of a learned codebook (VQ-VAE, van den Oord et al. 2017): tokens for a categorical head.

1. ``encode``: images -> the encoder's vectors -> the nearest code of each, as ids [B, N] in raster order.
2. ``tokenize``: nothing to do.
3. ``decode``: ids -> codes -> the decoder.

The same network gives continuous tokens, the vectors before quantisation, as `VAEConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from continuar.errors import require
from continuar.tokenizers.base import TokenSpec
from continuar.tokenizers.networks import VQNetwork
from continuar.tokenizers.vae import NetworkTokenizer, check_image_size


@dataclass(frozen=True)
class VQConfig:
    """Square images as ids of a codebook."""

    kind: Literal["vq"] = "vq"
    network: VQNetwork = field(default_factory=VQNetwork)
    """The autoencoder's architecture; its weights are saved beside the config."""
    image_size: int = 256
    """Side of the image in pixels; must be divisible by the stride."""

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.network.stride)

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        side = self.image_size // self.network.stride
        return TokenSpec((side, side), vocabulary=self.network.num_vq_embeddings)

    def build(self) -> VQTokenizer:
        """The tokenizer, with random weights."""
        return VQTokenizer(self)


def nearest_codes(x_MD: Tensor, codebook_VD: Tensor) -> Tensor:
    """The id [M] of the nearest code of each vector, in float32."""
    return torch.cdist(x_MD.float(), codebook_VD.float()).argmin(1)


class VQTokenizer(NetworkTokenizer):
    """Ids of the codebook. Latents are the ids [B, N] int64 themselves."""

    @property
    def codebook(self) -> Tensor:
        """[V, C]"""
        return self.network.quantize.embedding.weight

    def encode(self, images_B3HW: Tensor) -> Tensor:
        x_MC = super().encode(images_B3HW).permute(0, 2, 3, 1).flatten(0, 2)
        return nearest_codes(x_MC, self.codebook).view(len(images_B3HW), -1)

    def encoding_state(self) -> dict[str, Tensor]:
        codes = {k: v for k, v in self.state_dict().items() if k.startswith("network.quantize.")}
        return super().encoding_state() | codes

    def tokenize(self, latents: Tensor) -> Tensor:
        return latents.long()

    def decode(self, tokens: Tensor) -> Tensor:
        low, high = (int(v) for v in tokens.aminmax())
        require(low >= 0 and high < self.spec.vocabulary, f"ids run from {low} to {high}; allowed: 0 to {self.spec.vocabulary - 1}")
        codes_BCHW = self.codebook[tokens].view(len(tokens), *self.spec.grid, -1).permute(0, 3, 1, 2)
        return self.config.network.decode_codes(self.network, codes_BCHW.contiguous()).clamp(-1, 1)
