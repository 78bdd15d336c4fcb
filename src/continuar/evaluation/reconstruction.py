"""How well a tokenizer's reconstructions agree with images: PSNR and SSIM, per image in float64, and as distributions.

The Frechet distance of reconstructions to their originals is rFID with the FID Inception weights, and only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.errors import require
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import FeatureNetwork, exact_float32
from continuar.evaluation.samples import Images
from continuar.pipeline import to_uint8
from continuar.statistics import MomentAccumulator, psnr
from continuar.tokenizers import Tokenizer

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class Reconstruction:
    """Averages over ``count`` images; ``distance_name`` is what ``frechet_distance`` may be called."""

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
    """

    def __init__(self, network: FeatureNetwork | None = None) -> None:
        self._network = network
        self._decibels: list[np.ndarray] = []
        self._similarities: list[np.ndarray] = []
        self._originals, self._copies = MomentAccumulator(), MomentAccumulator()

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(map(len, self._decibels))

    def add(self, images_BHW3: np.ndarray, others_BHW3: np.ndarray) -> None:
        """uint8 images and their reconstructions.

        Raises:
            UserError: see `ssim`.
        """
        self._decibels.append(psnr(mean_squared_error(images_BHW3, others_BHW3)))
        self._similarities.append(ssim(images_BHW3, others_BHW3))
        if self._network is not None:
            self._originals.add(self._network(images_BHW3).features_ND)
            self._copies.add(self._network(others_BHW3).features_ND)

    def result(self) -> Reconstruction:
        """Of one image or more, two for a Frechet distance."""
        network = self._network
        return Reconstruction(
            count=self.count,
            psnr=float(np.concatenate(self._decibels).mean()),
            ssim=float(np.concatenate(self._similarities).mean()),
            frechet_distance=None if network is None else frechet_distance(self._copies.moments(), self._originals.moments()),
            distance_name=None if network is None else network.title("rFID", "Frechet distance of reconstructions"),
        )


def mean_squared_error(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """Mean squared difference [B] of uint8 images."""
    _check(a_BHW3, b_BHW3)
    error = (a_BHW3.astype(np.float64) - b_BHW3).reshape(len(a_BHW3), -1)
    return (error**2).mean(1)


def ssim(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """Structural similarity [B] of uint8 images (Wang et al. 2004), 1 for equal ones.

    Gaussian windows of 11 x 11 with sigma 1.5, where they fit, each channel by itself.

    Raises:
        UserError: images smaller than the window.
    """
    _check(a_BHW3, b_BHW3)
    side = min(a_BHW3.shape[1:3])
    require(side >= _WINDOW, f"images are {side} pixels; allowed for SSIM: {_WINDOW} or more")
    x, y = (torch.from_numpy(v.astype(np.float64)).permute(0, 3, 1, 2) for v in (a_BHW3, b_BHW3))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean((1, 2, 3)).numpy()


def reconstruct(tokenizer: Tokenizer, images_BHW3: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """uint8 images to latents and back; where there is a posterior, from its mean."""
    with exact_float32():
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


def _blurred(x_BCHW: Tensor) -> Tensor:
    """Under the window, rows and columns in turn."""
    place = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = (-(place**2) / (2 * _SIGMA**2)).exp()
    weights = weights / weights.sum()
    channels = x_BCHW.shape[1]
    rows = F.conv2d(x_BCHW, weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)


def _check(a: np.ndarray, b: np.ndarray) -> None:
    require(a.shape == b.shape and a.ndim == 4, f"images are {a.shape} and {b.shape}; allowed: equal shapes [B, H, W, 3]")
