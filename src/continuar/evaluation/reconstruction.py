"""Scores of a tokenizer's reconstructions: PSNR and SSIM per image, and the Frechet distance to the originals.

The Frechet distance of reconstructions to their originals is rFID with the FID Inception weights, and only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from continuar.errors import UserError, require
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.samples import Images
from continuar.pipeline import to_uint8
from continuar.statistics import MomentAccumulator, psnr
from continuar.tensors import exact_float32
from continuar.tokenizers import Tokenizer

_WINDOW = 11


@dataclass(frozen=True)
class Reconstruction:
    """Means over ``count`` images; ``distance_name`` is the name that ``frechet_distance`` may be called by."""

    count: int
    psnr: float
    """Decibels; infinite if every image comes back exactly."""
    ssim: float
    """-1..1"""
    frechet_distance: float | None
    distance_name: str | None


class ReconstructionScores:
    """Collects images and their reconstructions, block by block.

    Args:
        network: for the Frechet distance; None leaves it out.

    Raises:
        UserError: torchmetrics is not installed.
    """

    def __init__(self, network: FeatureNetwork | None = None) -> None:
        _torchmetrics()  # refused before the work, not after the first block
        self._network = network
        self._decibels: list[np.ndarray] = []
        self._similarities: list[np.ndarray] = []
        self._originals, self._copies = MomentAccumulator(), MomentAccumulator()

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(map(len, self._decibels))

    def add(self, images_BHW3: np.ndarray, others_BHW3: np.ndarray) -> None:
        """Adds uint8 images and their reconstructions.

        Raises:
            UserError: see `ssim`.
        """
        self._decibels.append(psnr(mean_squared_error(images_BHW3, others_BHW3)))
        self._similarities.append(ssim(images_BHW3, others_BHW3))
        if self._network is not None:
            self._originals.add(self._network(images_BHW3).features_ND)
            self._copies.add(self._network(others_BHW3).features_ND)

    def result(self) -> Reconstruction:
        """Returns the scores of one image or more; of two or more for a Frechet distance."""
        network = self._network
        return Reconstruction(
            count=self.count,
            psnr=float(np.concatenate(self._decibels).mean()),
            ssim=float(np.concatenate(self._similarities).mean()),
            frechet_distance=None if network is None else frechet_distance(self._copies.moments(), self._originals.moments()),
            distance_name=None if network is None else network.title("rFID", "Frechet distance of reconstructions"),
        )


def mean_squared_error(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """The mean squared difference [B] of uint8 images, for `psnr`."""
    _check_shapes(a_BHW3, b_BHW3)
    return ((a_BHW3.astype(np.float64) - b_BHW3) ** 2).reshape(len(a_BHW3), -1).mean(1)


def ssim(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """Structural similarity [B] of uint8 images in float64 (Wang et al. 2004), 1 for equal ones.

    Gaussian windows of 11 x 11 with sigma 1.5, each channel by itself.

    Raises:
        UserError: images smaller than the window, or torchmetrics is not installed.
    """
    _check_shapes(a_BHW3, b_BHW3)
    side, edge = min(a_BHW3.shape[1:3]), _WINDOW // 2
    require(side >= _WINDOW, f"images are {side} pixels; allowed for SSIM: {_WINDOW} or more")
    x, y = (torch.from_numpy(v.astype(np.float64)).permute(0, 3, 1, 2) for v in (a_BHW3, b_BHW3))
    _, map_B3HW = _torchmetrics().structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    # torchmetrics' own mean includes windows over the edge, filled with mirrored pixels; the paper takes windows inside the image.
    return map_B3HW[..., edge:-edge, edge:-edge].mean((1, 2, 3)).numpy()


def _torchmetrics() -> Any:
    try:
        return import_module("torchmetrics.functional.image")
    except ImportError as problem:
        raise UserError("SSIM needs torchmetrics: pip install 'continuar[metrics]'") from problem


def reconstruct(tokenizer: Tokenizer, images_BHW3: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Encodes and decodes uint8 images; a tokenizer with a posterior decodes its mean."""
    # TF32 differs between batch sizes, so that scores would depend on them.
    with torch.no_grad(), exact_float32():
        x_B3HW = torch.from_numpy(np.ascontiguousarray(images_BHW3)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return to_uint8(tokenizer.reconstruct(tokenizer.encode(x_B3HW))).cpu().numpy()


def score_reconstructions(
    tokenizer: Tokenizer,
    images: Images,
    network: FeatureNetwork | None = None,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Scores a tokenizer on images, streamed.

    Args:
        network: for the Frechet distance; None leaves it out.
        device: where the tokenizer is.

    Raises:
        UserError: an image that the tokenizer does not take; see `ssim`.
    """
    scores = ReconstructionScores(network)
    for first, block in images.blocks(batch_size):
        scores.add(block, reconstruct(tokenizer, block, device))
        if on_progress is not None:
            on_progress(first + len(block), len(images))
    return scores.result()


def _check_shapes(a: np.ndarray, b: np.ndarray) -> None:
    require(a.shape == b.shape and a.ndim == 4, f"images are {a.shape} and {b.shape}; allowed: equal shapes [B, H, W, 3]")
