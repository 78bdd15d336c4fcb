"""Moments and distances in closed form; features and classifier on real classes at small size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch.nn import functional as F

from continuar.data.loader import load_images
from continuar.errors import UserError
from continuar.evaluation.metrics import NeighbourSearch, class_accuracy, frechet_distance, nearest_neighbours, neighbours_picture
from continuar.evaluation.networks import Classifier, ClassifierConfig, SqueezeNet, extract
from continuar.statistics import Moments, moments

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS = SHARED / "weights" / "squeezenet1_1_imagenet.safetensors"
IMAGENETTE = SHARED / "data" / "imagenette128-val.parquet"
needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="the SqueezeNet weights are not beside the repository")


def gaussian(mean: list[float], std: list[float]) -> Moments:
    return Moments(10, np.array(mean), np.diag(np.array(std) ** 2))


@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 2, *[st.floats(0, 3)] * 2), min_size=1, max_size=5))
def test_frechet_distance_of_diagonal_gaussians(rows: list[tuple[float, float, float, float]]) -> None:
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


def test_nearest_neighbours_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    query, reference = rng.normal(size=(20, 5)), rng.normal(size=(50, 5))
    distances, indices = nearest_neighbours(query, reference, k=3, block=7)
    expected = np.linalg.norm(query[:, None] - reference[None], axis=-1)
    assert np.array_equal(indices, expected.argsort(1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :3], rtol=1e-3)
    with pytest.raises(UserError, match="k is 51; allowed: 1 to 50"):
        nearest_neighbours(query, reference, k=51)


@needs_weights
def test_squeezenet_takes_bgr_with_caffe_s_means() -> None:
    from safetensors.torch import load_file

    network = SqueezeNet.from_file(WEIGHTS)
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    seen = []
    network.layers[0].register_forward_hook(lambda m, i, o: seen.append(o))
    assert network(torch.from_numpy(image)).shape == (1, 512)
    weights = load_file(WEIGHTS)
    blue_first = torch.from_numpy(image[..., ::-1].copy()).permute(0, 3, 1, 2).float()
    centred = blue_first - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    expected = F.conv2d(centred, weights["features.0.weight"], weights["features.0.bias"], stride=2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-2)


@needs_weights
@pytest.mark.skipif(not IMAGENETTE.exists(), reason="Imagenette is not beside the repository")
def test_squeezenet_features_tell_classes_apart() -> None:
    images = load_images(IMAGENETTE, size=128)
    features = extract(SqueezeNet.from_file(WEIGHTS), images.images[:260], batch_size=64)
    _, nearest = nearest_neighbours(features[200:], features[:200], k=5)
    votes = np.array([np.bincount(images.labels[row], minlength=10).argmax() for row in nearest])
    assert class_accuracy(votes, images.labels[200:260]) > 0.6


def test_squeezenet_refuses_other_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        SqueezeNet.from_file(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"missing: .*of another shape: layers.0.weight"):
        SqueezeNet.from_file(tmp_path / "other.safetensors")


def test_classifier_learns_colours_and_survives_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = rng.integers(0, 120, (96, 8, 8, 3), np.uint8)
    images[np.arange(96), :, :, labels] += 100
    # Not narrower: oneDNN of torch 2.13 hangs on some AMD CPUs in the gradient of a strided 1x1 convolution of 4 channels.
    network = Classifier(ClassifierConfig(("red", "green", "blue"), width=8, blocks=1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert class_accuracy(network.predict(images), labels) > 0.95
    network.save(tmp_path / "c")
    again = Classifier.load(tmp_path / "c")
    assert again.config == network.config
    assert np.array_equal(again.predict(images), network.predict(images))
    with pytest.raises(UserError, match="1 predictions for 2 labels"):
        class_accuracy(np.zeros(1), np.zeros(2))


def test_a_search_block_by_block_finds_what_brute_force_finds() -> None:
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


def test_neighbours_picture_shows_each_sample_and_what_is_near_it() -> None:
    colours = np.arange(0, 240, 30, dtype=np.uint8).reshape(2, 4, 1, 1, 1)
    images = np.broadcast_to(colours, (2, 4, 8, 8, 3))
    picture = np.asarray(neighbours_picture(images[:, 0], images[:, 1:], np.zeros((2, 3))))
    assert [c for c in colours.ravel().tolist() if not (picture == c).all(-1).any()] == []
