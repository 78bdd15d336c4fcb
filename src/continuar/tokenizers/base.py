"""The interface of a tokenizer: images <-> tokens of about unit standard deviation."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
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

    # Computed once: samplers ask for these in every call.

    @cached_property
    def kind(self) -> TokenKind:
        """ "vector": tokens are floats [B, N, D]; "id": int64 [B, N]."""
        return "id" if self.vocabulary else "vector"

    @cached_property
    def size(self) -> int:
        """D of vectors, V of ids."""
        return self.vocabulary or self.dim

    @cached_property
    def seq_len(self) -> int:
        """N, the number of tokens."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tokens of one image: [N, D], or [N] for ids."""
        return (self.seq_len,) if self.vocabulary else (self.seq_len, self.dim)

    @cached_property
    def dtype(self) -> torch.dtype:
        """int64 for ids, float32 for vectors."""
        return torch.int64 if self.vocabulary else torch.float32

    def blank(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Tokens of ``batch`` images, all zero: float32 [B, N, D], or int64 [B, N]."""
        return torch.zeros(batch, *self.shape, dtype=self.dtype, device=device)


class Tokenizer(nn.Module, ABC):
    """Images are [B, 3, H, W] floats in [-1, 1]; ``encode`` gives what a cache keeps, ``tokenize`` what a model sees.

    Tokens are [B, N, D] floats of about unit std, or [B, N] int64 ids: see ``spec.kind``. A tokenizer's parameters and buffers, if
    it has any, are saved beside the model as tokenizer.safetensors.

    Attributes:
        config: the frozen config that builds it. spec: its tokens.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config: Any = config
        self.spec: TokenSpec = config.spec

    def fit(self, images_n3HW: Tensor) -> None:
        """Learns from training images [n, 3, H, W] what the config leaves open; most tokenizers have nothing to learn."""

    @abstractmethod
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Cacheable latents, first dimension B: pixels, posterior moments, or ids."""

    def encoding_state(self) -> dict[str, Tensor]:
        """The weights that `encode` depends on; another `fingerprint` of them makes a cache of latents invalid."""
        return self.state_dict()

    @abstractmethod
    def tokenize(self, latents: Tensor) -> Tensor:
        """Model-ready tokens. Draws from the posterior if there is one."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], clamped."""

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Images of latents that `encode` gave, without any draw and without needing a scale."""
        return self.decode(self.tokenize(latents))


def fingerprint(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits that identify the encoder: a hash of `Tokenizer.encoding_state`.

    Scale, patch, image size and decoder are not part of it: they may change without making cached latents wrong.
    """
    digest = hashlib.blake2b(type(tokenizer).__name__.encode(), digest_size=16)
    for name, tensor in sorted(tokenizer.encoding_state().items()):
        values = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_images(images_B3HW: Tensor, size: int) -> None:
    """Refuses images of another shape than [B, 3, size, size]."""
    fits = images_B3HW.shape[1:] == (3, size, size)
    require(fits, f"images are {tuple(images_B3HW.shape)}; allowed: [B, 3, {size}, {size}]")
