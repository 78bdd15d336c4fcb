"""What a tokenizer is: images <-> tokens of about unit standard deviation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from continuar.errors import require

TokenKind = Literal["vector", "id"]


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of one image: an h x w grid in raster order, of vectors [dim] or of ids 0..vocabulary-1."""

    grid: tuple[int, int]
    dim: int = 0
    """D, the size of a vector token; 0 for ids."""
    vocabulary: int = 0
    """V, the number of ids; 0 for vectors."""

    def __post_init__(self) -> None:
        require(min(self.grid) >= 1, f"token grid is {self.grid}; allowed: 1 or more each")
        require(min(self.dim, self.vocabulary) >= 0, f"dim {self.dim}, vocabulary {self.vocabulary}; allowed: 0 or more")
        require(
            (self.dim > 0) != (self.vocabulary > 0),
            f"dim {self.dim}, vocabulary {self.vocabulary}; allowed: one of them above 0, vectors or ids",
        )

    @property
    def kind(self) -> TokenKind:
        """ "vector": tokens are floats [B, N, D]; "id": int64 [B, N]."""
        return "id" if self.vocabulary else "vector"

    @property
    def size(self) -> int:
        """D of vectors, V of ids."""
        return self.vocabulary or self.dim

    def blank(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Tokens of ``batch`` images, all zero: float32 [B, N, D], or int64 [B, N]."""
        if self.kind == "id":
            return torch.zeros(batch, self.seq_len, dtype=torch.int64, device=device)
        return torch.zeros(batch, self.seq_len, self.dim, device=device)

    @property
    def seq_len(self) -> int:
        """N, the number of tokens."""
        return self.grid[0] * self.grid[1]


class Tokenizer(nn.Module, ABC):
    """Images are [B, 3, H, W] float in [-1, 1]; ``encode`` is what a cache may keep, ``tokenize`` what a model sees.

    Tokens are [B, N, D] floats of about unit std, or [B, N] int64 ids, as ``spec.kind`` says. Parameters and buffers, where a
    tokenizer has them, are saved beside the model as tokenizer.safetensors.
    """

    config: Any
    """The frozen config that builds it."""
    spec: TokenSpec

    def fit(self, images_n3HW: Tensor) -> None:
        """Learns from training images [n, 3, H, W] what the config leaves open; most tokenizers leave nothing open."""

    @abstractmethod
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Cacheable latents, first dimension B: patches, or posterior moments."""

    def encoding_state(self) -> dict[str, Tensor]:
        """The weights that `encode` depends on: latents kept in a cache belong to them."""
        return self.state_dict()

    @abstractmethod
    def tokenize(self, latents: Tensor) -> Tensor:
        """Model-ready tokens. Draws from the posterior where there is one."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], clamped."""

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Images of latents as `encode` gives them, without any draw and whatever the scale."""
        return self.decode(self.tokenize(latents))


def check_patches(image_size: int, patch: int) -> None:
    """Refuses squares that do not tile the image."""
    require(image_size >= 1 and patch >= 1, f"image size {image_size}, patch {patch}: 1 or more each")
    require(
        image_size % patch == 0,
        f"image size {image_size} is not divisible by the patch {patch}; allowed patches: "
        + ", ".join(str(p) for p in range(1, image_size + 1) if image_size % p == 0),
    )


def pixels_of(images_B3HW: Tensor, size: int, channels: int) -> Tensor:
    """Images [B, 3, size, size] as [B, channels, size, size]; one channel is the mean of three.

    Raises:
        UserError: images of another shape.
    """
    require(images_B3HW.shape[1:] == (3, size, size), f"images are {tuple(images_B3HW.shape)}; allowed: [B, 3, {size}, {size}]")
    return images_B3HW if channels == 3 else images_B3HW.mean(1, keepdim=True)


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
