"""What a tokenizer is: images <-> tokens of about unit standard deviation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from continuar.errors import require


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of one image: an h x w grid in raster order, of vectors [dim]."""

    grid: tuple[int, int]
    dim: int

    def __post_init__(self) -> None:
        require(min(self.grid) >= 1 and self.dim >= 1, f"token grid {self.grid} of dim {self.dim}; allowed: 1 or more each")

    @property
    def positions(self) -> int:
        """N, the number of tokens."""
        return self.grid[0] * self.grid[1]


class Tokenizer(nn.Module, ABC):
    """Images are [B, 3, H, W] float in [-1, 1]; ``encode`` is what a cache may keep, ``tokenize`` what a model sees."""

    spec: TokenSpec

    @abstractmethod
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Cacheable latents, first dimension B: patches, or posterior moments."""

    @abstractmethod
    def tokenize(self, latents: Tensor) -> Tensor:
        """Model-ready tokens [B, N, D], about unit std. Draws from the posterior where there is one."""

    @abstractmethod
    def decode(self, tokens_BND: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], clamped."""


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
