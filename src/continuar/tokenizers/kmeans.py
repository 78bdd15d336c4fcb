"""Pixels as ids: each p x p patch is the nearest of V patches that k-means found in the training images.

It gives the categorical head ids without an autoencoder to train: for tests, small data and CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from continuar.errors import UserError, require
from continuar.tokenizers.base import Tokenizer, TokenSpec
from continuar.tokenizers.pixel import PatchConfig, patchify, unpatchify

MAX_FITTED = 200_000
"""The most patches that k-means sees; more change the codebook little."""


@dataclass(frozen=True)
class CodebookConfig(PatchConfig):
    """Square images cut into patches, each replaced by the nearest entry of a k-means codebook."""

    kind: Literal["codebook"] = "codebook"
    vocabulary: int = 512
    """V, the number of entries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.vocabulary >= 2, f"tokenizer.vocabulary is {self.vocabulary}; allowed: 2 or more")

    @property
    def spec(self) -> TokenSpec:
        """The tokens of one image."""
        return TokenSpec(self.grid, vocabulary=self.vocabulary)

    def build(self) -> CodebookTokenizer:
        """The tokenizer, its codebook still empty."""
        return CodebookTokenizer(self)


class CodebookTokenizer(Tokenizer):
    """Ids of the nearest codebook entries. Latents are the ids [B, N]; the codebook [V, C p p] holds pixels in [-1, 1]."""

    codebook: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        # NaN, so that a codebook that was never fitted cannot pass for a fitted one.
        self.register_buffer("codebook", torch.full((config.vocabulary, config.channels * config.patch**2), torch.nan))

    def fit(self, images_n3HW: Tensor, seed: int = 0) -> None:
        """Fits the codebook by k-means in mini-batches (Lloyd 1982; Sculley 2010) on patches of training images.

        Raises:
            UserError: scikit-learn is missing, or there are fewer patches than entries.
        """
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError as problem:
            raise UserError("fitting a codebook needs scikit-learn: pip install 'continuar[train]'") from problem
        patches = patchify(self.config.pixels(images_n3HW), self.config.patch).flatten(0, 1).cpu().numpy()
        generator = np.random.default_rng(seed)
        if len(patches) > MAX_FITTED:
            patches = patches[generator.choice(len(patches), MAX_FITTED, replace=False)]
        size = self.config.vocabulary
        require(len(patches) >= size, f"{len(patches)} patches for a codebook of {size}; allowed: as many patches or more")
        found = MiniBatchKMeans(size, batch_size=4096, max_iter=50, random_state=seed).fit(patches)
        self.codebook.copy_(torch.from_numpy(np.asarray(found.cluster_centers_)))

    def encode(self, images_B3HW: Tensor) -> Tensor:
        patches = patchify(self.config.pixels(images_B3HW), self.config.patch)
        # |x - c|^2 without |x|^2, which is the same for all c and does not change the minimum.
        distance = self.codebook.square().sum(-1) - 2 * patches @ self.codebook.T
        return distance.argmin(-1)

    def tokenize(self, latents: Tensor) -> Tensor:
        return latents.long()

    def decode(self, tokens: Tensor) -> Tensor:
        return unpatchify(self.codebook[tokens], self.config.patch, self.spec.grid).clamp(-1, 1).expand(-1, 3, -1, -1)
