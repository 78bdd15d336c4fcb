"""Reconstruction scores against their definitions and against torchmetrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from continuar.errors import UserError
from continuar.evaluation.images import open_images
from continuar.evaluation.moments import frechet_distance, moments
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.reconstruction import psnr, reconstruct, score_reconstructions, ssim
from continuar.tokenizers import PixelConfig
from tests.evaluation.tiny_networks import MeanColour

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 14, 13, 3), np.uint8)
OTHERS = (IMAGES * 0.7 + RNG.integers(0, 70, IMAGES.shape)).astype(np.uint8)


def brute_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One image and channel, window by window."""
    offset = np.arange(11) - 5
    w = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, c = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * ma * mb + c1) * (2 * c + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


def test_psnr_and_ssim_are_their_definitions() -> None:
    x, y = IMAGES.astype(np.float64), OTHERS.astype(np.float64)
    pairs = list(zip(x, y, strict=True))
    np.testing.assert_allclose(psnr(IMAGES, OTHERS), [20 * np.log10(255 / np.sqrt(((a - b) ** 2).mean())) for a, b in pairs])
    expected = [np.mean([brute_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in pairs]
    np.testing.assert_allclose(ssim(IMAGES, OTHERS), expected, rtol=1e-9)
    assert np.isinf(psnr(IMAGES, IMAGES)).all()
    np.testing.assert_allclose(ssim(IMAGES, IMAGES), 1)


def test_ssim_agrees_with_torchmetrics_on_windows_inside_the_image() -> None:
    """Its mean takes windows beyond the edge as well, over mirrored pixels."""
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2).double() for i in (IMAGES, OTHERS))
    _, every = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    np.testing.assert_allclose(ssim(IMAGES, OTHERS), every[..., 5:-5, 5:-5].mean((1, 2, 3)).numpy(), rtol=1e-9)


def test_a_tokenizer_is_scored_on_streamed_images(tmp_path: Path) -> None:
    """Pixels come back exactly; their grey version does not, by what the scores say."""
    images = RNG.integers(0, 256, (9, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "i.npz", images)
    network = FeatureNetwork.of(MeanColour(), "colour")
    exact = PixelConfig(image_size=16, patch=4, std=0.5).build()
    found = score_reconstructions(exact, open_images(tmp_path / "i.npz"), network, batch_size=4)
    assert (found.count, found.psnr, found.ssim) == (9, float("inf"), pytest.approx(1))
    assert found.frechet_distance == pytest.approx(0, abs=1e-9)
    grey = PixelConfig(image_size=16, patch=4, std=0.5, channels=1).build()
    found = score_reconstructions(grey, open_images(tmp_path / "i.npz"), network, batch_size=4)
    other = reconstruct(grey, images)
    np.testing.assert_allclose(other, images.mean(-1, keepdims=True).repeat(3, -1), atol=0.51)
    assert found.psnr == pytest.approx(psnr(images, other).mean())
    assert found.ssim == pytest.approx(ssim(images, other).mean())
    expected = frechet_distance(moments(network(other).features_ND), moments(network(images).features_ND))
    assert found.frechet_distance == pytest.approx(expected, rel=1e-9)
    assert found.distance_name == "Frechet distance of reconstructions (colour)"
    assert score_reconstructions(grey, open_images(tmp_path / "i.npz")).distance_name is None


def test_images_that_cannot_be_compared_are_one_line() -> None:
    with pytest.raises(UserError, match=r"images are 8x8; SSIM needs 11x11 or more"):
        ssim(IMAGES[:, :8, :8], OTHERS[:, :8, :8])
    with pytest.raises(UserError, match=r"images are \(5, 14, 13, 3\) and \(5, 8, 13, 3\); allowed: the same"):
        psnr(IMAGES, OTHERS[:, :8])
    with pytest.raises(UserError, match="of float64; allowed: uint8"):
        psnr(IMAGES / 255, OTHERS / 255)
