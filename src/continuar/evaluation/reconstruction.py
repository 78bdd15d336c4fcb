"""How well a tokenizer's reconstructions agree with images: PSNR and SSIM, per image in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from continuar.errors import require

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [B] of uint8 images, in dB; infinite for equal ones."""
    _check(a_BHW3, b_BHW3)
    error = (a_BHW3.astype(np.float64) - b_BHW3).reshape(len(a_BHW3), -1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / (error**2).mean(1))


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
