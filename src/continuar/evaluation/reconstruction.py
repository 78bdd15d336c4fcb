"""What a tokenizer loses: images against what comes back of them, pixel by pixel and as distributions.

1. PSNR = 10 log10(255^2 / MSE) of each image, averaged over images.
2. SSIM (Wang et al. 2004): means, variances and covariance under an 11x11 Gaussian window of std 1.5, K1 = 0.01, K2 = 0.03, on
   windows that lie inside the image, averaged over windows and channels.
3. The Frechet distance of reconstructions to originals (rFID, with the FID Inception weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.errors import require
from continuar.evaluation.features import exact_float32
from continuar.evaluation.images import Images
from continuar.evaluation.moments import MomentAccumulator, frechet_distance
from continuar.evaluation.networks import FeatureNetwork
from continuar.pipeline import to_uint8
from continuar.tokenizers import Tokenizer

_WINDOW, _STD, _K1, _K2, _RANGE = 11, 1.5, 0.01, 0.03, 255.0


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


def psnr(images_BHW3: np.ndarray, others_BHW3: np.ndarray) -> np.ndarray:
    """Of uint8 images [B, H, W, 3], pair by pair: [B] float64 decibels, infinite for equal ones."""
    _check_pairs(images_BHW3, others_BHW3)
    squares = (images_BHW3.astype(np.float64) - others_BHW3) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(_RANGE**2 / squares.mean((1, 2, 3)))


def ssim(images_BHW3: np.ndarray, others_BHW3: np.ndarray) -> np.ndarray:
    """Of uint8 images [B, H, W, 3], pair by pair: [B] float64; see the module's docstring.

    Raises:
        UserError: images smaller than the window.
    """
    _check_pairs(images_BHW3, others_BHW3)
    height, width = images_BHW3.shape[1:3]
    require(min(height, width) >= _WINDOW, f"images are {height}x{width}; SSIM needs {_WINDOW}x{_WINDOW} or more")
    x, y = (torch.from_numpy(np.ascontiguousarray(i)).permute(0, 3, 1, 2).double() for i in (images_BHW3, others_BHW3))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean((1, 2, 3)).numpy()


def _blur(x_B3HW: Tensor) -> Tensor:
    """The Gaussian mean of every window inside the image, channel by channel; separable."""
    offset = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * _STD**2))
    rows = (weight / weight.sum()).view(1, 1, _WINDOW, 1).expand(x_B3HW.shape[1], 1, -1, -1)
    x = F.conv2d(x_B3HW, rows, groups=len(rows))
    return F.conv2d(x, rows.transpose(2, 3), groups=len(rows))


def reconstruct(tokenizer: Tokenizer, images_BHW3: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """uint8 images through tokens and back; where there is a posterior, one draw of it."""
    with exact_float32():
        x_B3HW = torch.from_numpy(np.ascontiguousarray(images_BHW3)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return to_uint8(tokenizer.decode(tokenizer.tokenize(tokenizer.encode(x_B3HW)))).cpu().numpy()


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
        UserError: an image that the tokenizer does not take; see `psnr`, `ssim`.
    """
    decibels, similarities = [], []
    originals, copies = MomentAccumulator(), MomentAccumulator()
    for first, block in images.blocks(batch_size):
        other = reconstruct(tokenizer, block, device)
        decibels.append(psnr(block, other))
        similarities.append(ssim(block, other))
        if network is not None:
            originals.add(network(block).features_ND)
            copies.add(network(other).features_ND)
        if on_progress is not None:
            on_progress(first + len(block), len(images))
    return Reconstruction(
        count=len(images),
        psnr=float(np.concatenate(decibels).mean()),
        ssim=float(np.concatenate(similarities).mean()),
        frechet_distance=None if network is None else frechet_distance(copies.moments(), originals.moments()),
        distance_name=None if network is None else network.title("rFID", "Frechet distance of reconstructions"),
    )


def _check_pairs(images_BHW3: np.ndarray, others_BHW3: np.ndarray) -> None:
    require(
        images_BHW3.ndim == 4 and images_BHW3.shape[-1] == 3 and images_BHW3.dtype == others_BHW3.dtype == np.uint8,
        f"images are {images_BHW3.shape} of {images_BHW3.dtype}; allowed: uint8 [n, H, W, 3]",
    )
    require(images_BHW3.shape == others_BHW3.shape, f"images are {images_BHW3.shape} and {others_BHW3.shape}; allowed: the same")
