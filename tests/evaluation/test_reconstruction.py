"""PSNR and SSIM, against SciPy's Gaussian filter, torchmetrics and closed forms; a tokenizer scored by them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.functional.image import structural_similarity_index_measure

from continuar.errors import UserError
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.reconstruction import ReconstructionScores, mean_squared_error, reconstruct, score_reconstructions, ssim
from continuar.evaluation.samples import open_images
from continuar.statistics import moments, psnr
from continuar.tokenizers import PixelConfig
from tests.evaluation.tiny_networks import MeanColour


def images(seed: int = 0, size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = np.stack([ndimage.gaussian_filter(rng.integers(0, 256, (size, size, 3)).astype(float), (2, 2, 0)) for _ in range(3)])
    a = ((a - a.min()) / (a.max() - a.min()) * 255).astype(np.uint8)
    return a, np.clip(a + rng.normal(0, (5, 20, 60), (size, size, 1, 3)).transpose(3, 0, 1, 2), 0, 255).astype(np.uint8)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, Equation 13, by SciPy's filter of the same window."""
    values = []
    for channel in range(3):
        x, y = a[..., channel].astype(np.float64), b[..., channel].astype(np.float64)

        def mean(v: np.ndarray) -> np.ndarray:
            return ndimage.gaussian_filter(v, 1.5, truncate=3.5)[5:-5, 5:-5]

        mx, my = mean(x), mean(y)
        vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = 2.55**2, 7.65**2
        values.append(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


def test_ssim_is_that_of_an_independent_implementation() -> None:
    a, b = images()
    found = ssim(a, b)
    np.testing.assert_allclose(found, [reference_ssim(x, y) for x, y in zip(a, b, strict=True)], rtol=1e-9)
    assert found[0] > found[1] > found[2]


def test_psnr_and_ssim_of_equal_images() -> None:
    a, _ = images()
    np.testing.assert_allclose(ssim(a, a), 1)
    assert np.isinf(psnr(mean_squared_error(a, a))).all()


def test_psnr_is_its_formula() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0], b[1, 0, 0, 0] = 255, 48
    np.testing.assert_allclose(psnr(mean_squared_error(a, b)), [0, 10 * np.log10(255**2 / (48**2 / 48))])


def test_psnr_and_ssim_refuse_other_shapes() -> None:
    a, b = images()
    with pytest.raises(UserError, match="allowed: equal shapes"):
        mean_squared_error(a, b[:2])
    with pytest.raises(UserError, match="images are 10 pixels; allowed for SSIM: 11 or more"):
        ssim(a[:, :10, :10], b[:, :10, :10])


def test_reconstruction_scores_without_torchmetrics_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UserError, match=r"SSIM needs torchmetrics: pip install 'continuar\[metrics\]'"):
        ReconstructionScores()


def test_ssim_is_the_mean_of_windows_inside_the_image() -> None:
    """torchmetrics' own mean takes windows beyond the edge as well, over mirrored pixels."""
    a, b = images()
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2).double() for i in (a, b))
    _, every = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    np.testing.assert_allclose(ssim(a, b), every[..., 5:-5, 5:-5].mean((1, 2, 3)).numpy(), rtol=1e-9)


def test_score_reconstructions_streams_images(tmp_path: Path) -> None:
    """Pixels come back exactly; their grey version does not, by what the scores say."""
    originals = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "i.npz", originals)
    network = FeatureNetwork.from_module(MeanColour(), "colour")
    exact = PixelConfig(image_size=16, patch=4, std=0.5).build()
    found = score_reconstructions(exact, open_images(tmp_path / "i.npz"), network, batch_size=4)
    assert (found.count, found.psnr, found.ssim) == (9, float("inf"), pytest.approx(1))
    assert found.frechet_distance == pytest.approx(0, abs=1e-9)
    grey = PixelConfig(image_size=16, patch=4, std=0.5, channels=1).build()
    found = score_reconstructions(grey, open_images(tmp_path / "i.npz"), network, batch_size=4)
    other = reconstruct(grey, originals)
    np.testing.assert_allclose(other, originals.mean(-1, keepdims=True).repeat(3, -1), atol=0.51)
    assert found.psnr == pytest.approx(psnr(mean_squared_error(originals, other)).mean())
    assert found.ssim == pytest.approx(ssim(originals, other).mean())
    expected = frechet_distance(moments(network(other).features_ND), moments(network(originals).features_ND))
    assert found.frechet_distance == pytest.approx(expected, rel=1e-6)
    assert found.distance_name == "Frechet distance of reconstructions (colour)"
    assert score_reconstructions(grey, open_images(tmp_path / "i.npz")).distance_name is None
