"""Every score against its definition written out or its closed form, and against torchmetrics and scipy if they have it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TheirInceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from continuar.errors import UserError
from continuar.evaluation import metrics
from continuar.evaluation.metrics import (
    NeighbourSearch,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    neighbours_picture,
    precision_recall,
)
from continuar.statistics import Moments, moments


def gaussian(mean: list[float], std: list[float]) -> Moments:
    return Moments(10, np.array(mean), np.diag(np.array(std) ** 2))


@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 2, *[st.floats(0, 3)] * 2), min_size=1, max_size=5))
def test_frechet_distance_of_diagonal_gaussians_is_closed_form(rows: list[tuple[float, float, float, float]]) -> None:
    m1, m2, s1, s2 = (list(column) for column in zip(*rows, strict=True))
    expected = sum((a - b) ** 2 + (c - d) ** 2 for a, b, c, d in rows)
    assert frechet_distance(gaussian(m1, s1), gaussian(m2, s2)) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_agrees_with_the_matrix_square_root_also_for_low_rank() -> None:
    rng = np.random.default_rng(0)
    for count in (8, 500):
        a, b = moments(rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12))), moments(rng.normal(size=(500, 12)))
        root = linalg.sqrtm(a.covariance @ b.covariance).real
        expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
        assert frechet_distance(a, a) < 1e-8 * np.trace(a.covariance)


def test_frechet_distance_refuses_other_dimensions() -> None:
    with pytest.raises(UserError, match="3 and 4 dimensions"):
        frechet_distance(moments(np.eye(3)), moments(np.zeros((5, 4))))


@pytest.mark.parametrize("rank", [1, 20, 128])
def test_frechet_distance_of_scaled_low_rank_covariance(rank: int) -> None:
    """tr(S + 4 S - 2 (4 S^2)^{1/2}) = tr S."""
    rng = np.random.default_rng(0)
    a = moments(rng.normal(size=(600, rank)) @ rng.normal(size=(rank, 128)))
    b = Moments(a.count, a.mean, 4 * a.covariance)
    assert frechet_distance(a, b) == pytest.approx(np.trace(a.covariance), rel=1e-11)
    assert frechet_distance(a, a) < 1e-11 * np.trace(a.covariance)


class Pixels(nn.Module):
    """A feature network for torchmetrics: the pixels of 2x2 images, [B, 12] float64."""

    num_features = 12

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return images_B3HW[:, :, :2, :2].flatten(1).double()


def pictures(count: int, seed: int, shift: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shift, 200 + shift, (count, 3, 2, 2), generator=generator, dtype=torch.uint8)


def features_of(images: torch.Tensor) -> np.ndarray:
    return Pixels()(images).numpy()


def brute_inception_score(p: np.ndarray) -> float:
    return float(np.exp(np.mean([(row * np.log(row / p.mean(0))).sum() for row in p])))


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_its_definition(splits: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (47, 6)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    expected = [brute_inception_score(part) for part in np.array_split(p, splits)]
    found = inception_score(logits, splits=splits, seed=None)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.std == pytest.approx(np.std(expected), rel=1e-9, abs=1e-12)
    assert found.whole == pytest.approx(brute_inception_score(p), rel=1e-9)
    again = inception_score(np.log(p), splits=splits, seed=None)
    assert (again.mean, again.whole) == pytest.approx((found.mean, found.whole), rel=1e-12)


def test_inception_score_of_the_extremes() -> None:
    """Every class once, with certainty: C. Every image the same: 1. Shuffling keeps the splits of sorted images from being poor."""
    certain = 100 * np.repeat(np.eye(5), 40, axis=0)
    assert inception_score(certain).whole == pytest.approx(5)
    assert inception_score(np.ones((20, 7))).mean == pytest.approx(1)
    assert inception_score(certain, splits=5, seed=None).mean == pytest.approx(1)
    assert inception_score(certain, splits=5).mean > 4.5
    with pytest.raises(UserError, match="splits is 10; allowed: 1 to 3"):
        inception_score(np.ones((3, 7)))


def test_inception_score_agrees_with_torchmetrics() -> None:
    images = pictures(60, 0)
    theirs = TheirInceptionScore(feature=_Scaled(), splits=1)
    theirs.update(images)
    assert inception_score(_Scaled()(images).numpy(), splits=1).mean == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


class _Scaled(Pixels):
    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return super().forward(images_B3HW) / 50


def brute_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    def among(f: np.ndarray) -> float:
        return float(np.mean([kernel(a, b) for a, b in itertools.permutations(f, 2)]))

    return among(x) + among(y) - 2 * float(np.mean([kernel(a, b) for a in x for b in y]))


def test_kernel_distance_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (9, 4)), rng.normal(0.5, 1, (9, 4))
    assert kernel_distance(x, y, subsets=2, subset_size=9).mean == pytest.approx(brute_mmd(x, y), rel=1e-10)
    found = kernel_distance(x, y, subsets=5, subset_size=4, seed=3)
    draw = np.random.default_rng(3)
    expected = [
        brute_mmd(x[draw.choice(9, 4, replace=False)], y[draw.choice(9, 4, replace=False)]) for _ in range(5)
    ]  # as documented: samples' subset first
    assert (found.mean, found.std) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


def test_kernel_distance_agrees_with_torchmetrics_and_is_unbiased() -> None:
    a, b = pictures(40, 1), pictures(40, 2, shift=30)
    theirs = KernelInceptionDistance(feature=Pixels(), subsets=3, subset_size=40)
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    ours = kernel_distance(features_of(a), features_of(b), subsets=3, subset_size=40)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    rng = np.random.default_rng(0)
    same = kernel_distance(rng.normal(size=(600, 3)), rng.normal(size=(600, 3)), subsets=100, subset_size=50)
    assert abs(same.mean) < 4 * same.std / 10
    with pytest.raises(UserError, match="subset size is 1000; allowed: 2 to 40, the smaller set"):
        kernel_distance(features_of(a), features_of(b))
    with pytest.raises(UserError, match="features of 12 and 3 dimensions cannot be compared"):
        kernel_distance(features_of(a), np.zeros((40, 3)))


def brute_manifolds(samples: np.ndarray, reference: np.ndarray, k: int, k_density: int) -> tuple[float, float, float, float]:
    def balls(features: np.ndarray, k: int) -> list[float]:
        return [sorted(np.linalg.norm(f - np.delete(features, i, 0), axis=1))[k - 1] for i, f in enumerate(features)]

    def within(points: np.ndarray, centres: np.ndarray, radii: list[float]) -> np.ndarray:
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)] for p in points])

    dense = within(samples, reference, balls(reference, k_density))
    return (
        float(within(samples, reference, balls(reference, k)).any(1).mean()),
        float(within(reference, samples, balls(samples, k)).any(1).mean()),
        float(dense.sum(1).mean() / k_density),
        float(dense.any(0).mean()),
    )


@given(st.integers(0, 1000), st.integers(6, 25), st.integers(6, 25), st.integers(1, 3), st.integers(1, 5))
def test_precision_recall_density_coverage_are_their_definitions(seed: int, m: int, n: int, k: int, k_density: int) -> None:
    rng = np.random.default_rng(seed)
    samples, reference = rng.normal(0, 0.7, (m, 3)).astype(np.float32), rng.normal(0.3, 1, (n, 3)).astype(np.float32)
    found = precision_recall(samples, reference, k=k, k_density=k_density)
    expected = brute_manifolds(samples.astype(np.float64), reference.astype(np.float64), k, k_density)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, rel=1e-12)


def test_precision_recall_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    samples, reference = (rng.normal(size=(n, 8)).astype(np.float32) + 100 for n in (150, 90))
    whole = precision_recall(samples, reference)
    monkeypatch.setattr(metrics, "_BLOCK_BYTES", 8 * 90 * 7)
    monkeypatch.setattr(metrics, "_COLUMNS", 13)
    assert precision_recall(samples, reference) == whole


def test_precision_recall_of_equal_sets_and_copies() -> None:
    rng = np.random.default_rng(0)
    features = 50 + rng.normal(size=(60, 16)).astype(np.float32)
    found = precision_recall(features, features.copy())
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    copies = np.repeat(features[:4], 8, axis=0)  # every ball has radius 0, and holds its own copies
    assert precision_recall(copies, copies).precision == 1
    far = precision_recall(features + 1000, features)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    with pytest.raises(UserError, match="k is 3 with 3 features; allowed: 1 to 2"):
        precision_recall(features[:3], features)
    with pytest.raises(UserError, match="k of density is 5 with 5 features; allowed: 1 to 4"):
        precision_recall(features, features[:5])


def reference_forms(a: Moments, b: Moments) -> dict[str, float]:
    """The Frechet distance by scipy's matrix square root, and by the eigenvalues of the product."""
    product = a.covariance @ b.covariance
    outer = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    return {
        "sqrtm": float(outer - 2 * np.trace(linalg.sqrtm(product).real)),
        "eigenvalues": float(outer - 2 * np.sqrt(np.clip(np.linalg.eigvals(product).real, 0, None)).sum()),
    }


@pytest.mark.parametrize("count", [9, 12, 200])
def test_frechet_distance_agrees_with_torchmetrics_and_two_other_forms(count: int) -> None:
    """12 dimensions: fewer images than those, as many, and enough."""
    a, b = pictures(count, 3), pictures(count, 4, shift=20)
    theirs = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    ours_a, ours_b = moments(features_of(a)), moments(features_of(b))
    found = frechet_distance(ours_a, ours_b)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)
    for form, expected in reference_forms(ours_a, ours_b).items():
        assert found == pytest.approx(expected, rel=1e-5), form


@pytest.mark.parametrize(("count", "rank"), [(500, 64), (500, 5), (20, 64), (2, 64)])
def test_frechet_distance_of_equal_sets_is_zero(count: int, rank: int) -> None:
    """Within 1e-6 of the covariance's trace: full rank, low rank, fewer images than dimensions."""
    rng = np.random.default_rng(0)
    found = moments(rng.normal(size=(count, rank)) @ rng.normal(size=(rank, 64)))
    assert frechet_distance(found, found) <= 1e-9 * np.trace(found.covariance)


def test_nearest_neighbours_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    query, reference = rng.normal(size=(20, 5)), rng.normal(size=(50, 5))
    distances, indices = nearest_neighbours(query, reference, k=3, block=7)
    expected = np.linalg.norm(query[:, None] - reference[None], axis=-1)
    assert np.array_equal(indices, expected.argsort(1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :3], rtol=1e-3)
    with pytest.raises(UserError, match="k is 51; allowed: 1 to 50"):
        nearest_neighbours(query, reference, k=51)


def test_neighbour_search_by_blocks_finds_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    query, reference = rng.normal(size=(7, 4)), rng.normal(size=(40, 4)).astype(np.float32)
    reference[13] = query[2] = reference[5]  # a copy, twice
    search = NeighbourSearch(query, 3)
    for first in (0, 11, 12, 30):
        search.add(reference[first : {0: 11, 11: 12, 12: 30, 30: 40}[first]], first)
    distances, indices = search.result()
    expected = np.linalg.norm(query[:, None].astype(np.float32) - reference[None], axis=-1)
    assert np.array_equal(indices, expected.argsort(1, kind="stable")[:, :3])
    assert distances[2, :2].tolist() == [0, 0]
    few = NeighbourSearch(query, 3)
    few.add(reference[:2], 0)
    with pytest.raises(UserError, match="k is 3; allowed: 1 to 2, the number of references"):
        few.result()


def test_neighbours_picture_shows_each_sample_and_its_neighbours() -> None:
    colours = np.arange(0, 240, 30, dtype=np.uint8).reshape(2, 4, 1, 1, 1)
    images = np.broadcast_to(colours, (2, 4, 8, 8, 3))
    picture = np.asarray(neighbours_picture(images[:, 0], images[:, 1:], np.zeros((2, 3))))
    assert [c for c in colours.ravel().tolist() if not (picture == c).all(-1).any()] == []
