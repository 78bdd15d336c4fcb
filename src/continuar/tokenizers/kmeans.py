"""Pixels as ids: each p x p patch is the nearest of V patches that k-means found in the training images.

A tokenizer for tests, small data and a CPU: it gives the categorical head ids without an autoencoder to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from continuar.errors import UserError, require
from continuar.tokenizers.base import Tokenizer, TokenSpec, check_patches, patchify, pixels_of, unpatchify

MAX_FITTED = 200_000
"""Patches that k-means looks at; more change the codebook little."""


@dataclass(frozen=True)
class CodebookConfig:
    """Square images cut into patches, each replaced by the nearest entry of a k-means codebook."""

    kind: Literal["codebook"] = "codebook"
    image_size: int = 32
    """Side of the image in pixels; must be divisible by the patch."""
    patch: int = 4
    """Side of a patch in pixels."""
    channels: Literal[1, 3] = 3
    """3 for colour; 1 keeps the mean of the channels."""
    vocabulary: int = 512
    """V, the number of entries."""

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        require(self.vocabulary >= 2, f"tokenizer.vocabulary is {self.vocabulary}; allowed: 2 or more")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        side = self.image_size // self.patch
        return TokenSpec((side, side), vocabulary=self.vocabulary)

    def build(self) -> CodebookTokenizer:
        """The tokenizer, its codebook still empty."""
        return CodebookTokenizer(self)


class CodebookTokenizer(Tokenizer):
    """See `CodebookConfig`. Latents are ids [B, N]; the codebook [V, C p p] holds pixels in [-1, 1]."""

    codebook: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config, self.spec = config, config.spec
        # Not a number anywhere: a codebook that was never fitted cannot pass for one.
        self.register_buffer("codebook", torch.full((config.vocabulary, config.channels * config.patch**2), torch.nan))

    def fit(self, images_n3HW: Tensor, seed: int = 0) -> None:
        """k-means (Lloyd 1982, in mini-batches, Sculley 2010; scikit-learn's) on patches of training images.

        Raises:
            UserError: scikit-learn is missing, or there are fewer patches than entries.
        """
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError as problem:
            raise UserError("fitting a codebook needs scikit-learn: pip install 'continuar[train]'") from problem
        patches = patchify(self._pixels(images_n3HW), self.config.patch).flatten(0, 1).cpu().numpy()
        generator = np.random.default_rng(seed)
        if len(patches) > MAX_FITTED:
            patches = patches[generator.choice(len(patches), MAX_FITTED, replace=False)]
        size = self.config.vocabulary
        require(len(patches) >= size, f"{len(patches)} patches for a codebook of {size}; allowed: as many patches or more")
        found = MiniBatchKMeans(size, batch_size=4096, max_iter=50, random_state=seed).fit(patches)
        self.codebook.copy_(torch.from_numpy(np.asarray(found.cluster_centers_)))

    def _pixels(self, images_B3HW: Tensor) -> Tensor:
        return pixels_of(images_B3HW, self.config.image_size, self.config.channels)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        patches = patchify(self._pixels(images_B3HW), self.config.patch)
        # |x - c|^2 less |x|^2, which is the same for all c.
        distance = self.codebook.square().sum(-1) - 2 * patches @ self.codebook.T
        return distance.argmin(-1)

    def tokenize(self, latents: Tensor) -> Tensor:
        return latents.long()

    def decode(self, tokens: Tensor) -> Tensor:
        return unpatchify(self.codebook[tokens], self.config.patch, self.spec.grid).clamp(-1, 1).expand(-1, 3, -1, -1)
