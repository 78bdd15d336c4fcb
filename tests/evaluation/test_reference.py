"""References: statistics computed here, read from ADM's layouts, held against the samples' network and resolution."""

import os
from pathlib import Path

import numpy as np
import pytest

from continuar.cli.main import main
from continuar.errors import UserError
from continuar.evaluation.metrics import NeighbourSearch
from continuar.evaluation.networks import FID_SHA256, FeatureNetwork, load_network
from continuar.evaluation.reference import measure_images, open_reference, read_statistics, reference_indices, write_statistics
from continuar.evaluation.samples import open_images
from continuar.statistics import moments
from tests.evaluation.tiny_networks import Halves, MeanColour, save_classifier, tiny_network
from tests.tiny import write_images

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
COLOUR = FeatureNetwork.from_module(MeanColour(), "colour")
FID = FeatureNetwork("inception", MeanColour(), FID_SHA256 + "00")
EXPECTED = moments(IMAGES.mean((1, 2), dtype=np.float32))


def adm(path: Path, **more: np.ndarray) -> Path:
    """A file in the layout of ADM's references."""
    spatial = {"mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(path, mu=EXPECTED.mean, sigma=EXPECTED.covariance, **spatial, **more)  # pyright: ignore[reportArgumentType]
    return path


@pytest.mark.parametrize("batch", [3, 7, 64])
def test_measure_images_gives_moments_of_all_and_features_of_the_chosen(tmp_path: Path, batch: int) -> None:
    np.savez(tmp_path / "i.npz", IMAGES)
    found = measure_images(open_images(tmp_path / "i.npz"), COLOUR, batch_size=batch, kept=6)
    np.testing.assert_allclose(found.moments.mean, EXPECTED.mean, rtol=1e-6)
    np.testing.assert_allclose(found.moments.covariance, EXPECTED.covariance, rtol=1e-4)
    chosen = reference_indices(20, 6)
    assert len(set(chosen.tolist())) == 6
    assert found.features_RD is not None
    np.testing.assert_allclose(found.features_RD, IMAGES[chosen].mean((1, 2)), rtol=1e-6)
    assert (found.moments.count, found.size) == (20, (8, 8))
    assert measure_images(open_images(tmp_path / "i.npz"), COLOUR, kept=0).features_RD is None


def test_measure_images_gives_spatial_moments_that_survive_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", IMAGES)
    network = FeatureNetwork.from_module(Halves(), "halves")
    write_statistics(tmp_path / "s.npz", measure_images(open_images(tmp_path / "i.npz"), network, batch_size=7, kept=6))
    again, _ = read_statistics(tmp_path / "s.npz")
    expected = moments(np.concatenate([IMAGES[:, :4].mean((1, 2)), IMAGES[:, 4:].mean((1, 2))], 1))
    assert again is not None
    assert again.spatial is not None
    np.testing.assert_allclose(again.spatial.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(again.spatial.covariance, expected.covariance, rtol=1e-4, atol=1e-3)


def test_write_statistics_keeps_every_bit(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", IMAGES)
    found = measure_images(open_images(tmp_path / "i.npz"), COLOUR, kept=6)
    write_statistics(tmp_path / "s.npz", found, IMAGES[:4])
    again, images = read_statistics(tmp_path / "s.npz")
    assert again is not None
    assert images is not None
    assert np.array_equal(images.read(0, 4), IMAGES[:4])
    for name in ("mean", "covariance"):
        assert np.array_equal(getattr(again.moments, name), getattr(found.moments, name))
    assert again.features_RD is not None
    assert np.array_equal(again.features_RD, found.features_RD)
    assert (again.network, again.sha256, again.size, again.source) == ("colour", COLOUR.sha256, (8, 8), str(tmp_path / "i.npz"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_open_reference_takes_adm_s_files_for_the_fid_network_s(tmp_path: Path) -> None:
    """Moments from the file, features from its 10,000 images; mu_s and sigma_s are handed on."""
    reference = open_reference(adm(tmp_path / "adm.npz", arr_0=IMAGES[:12]), FID, (8, 8))
    found = reference.measure(FID)
    assert np.array_equal(found.moments.mean, EXPECTED.mean)
    assert found.features_RD is not None
    np.testing.assert_allclose(found.features_RD, IMAGES[:12].mean((1, 2)), rtol=1e-6)
    write_statistics(tmp_path / "again.npz", found)
    with np.load(tmp_path / "again.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "features"} <= set(file)
        assert np.array_equal(file["sigma_s"], np.eye(2))
    other = open_reference(tmp_path / "adm.npz", COLOUR, (8, 8))
    assert "measured anew from its images" in other.notes[0]
    assert other.measure(COLOUR).moments.count == 12


def test_open_reference_without_images_gives_only_moments(tmp_path: Path) -> None:
    reference = open_reference(adm(tmp_path / "adm.npz"), FID, (64, 64))
    assert "does not tell its resolution" in reference.notes[0]
    assert reference.measure(FID).features_RD is None
    with pytest.raises(UserError, match=r"statistics of the network 'inception' \(FID weights\), not of the network 'colour'"):
        open_reference(tmp_path / "adm.npz", COLOUR, (8, 8))


def test_open_reference_crops_folders_to_the_samples_and_searches_them(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", size=16)
    reference = open_reference(folder, COLOUR, (8, 8))
    pixels = open_images(folder, size=8).read(0, 12)
    search = NeighbourSearch(pixels[[5, 1]].mean((1, 2)), k=2)
    found = reference.measure(COLOUR, batch_size=5, search=search)
    np.testing.assert_allclose(found.moments.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    distances, indices = search.result()
    assert indices[:, 0].tolist() == [5, 1]
    assert distances[:, 0] == pytest.approx(0, abs=1e-4)


def test_open_reference_takes_digits_by_name() -> None:
    pytest.importorskip("sklearn", reason="the extra [train] is not installed")
    statistics = open_reference("digits", load_network("pixels", None), (8, 8)).measure(load_network("pixels", None), kept=5)
    assert (statistics.moments.count, statistics.source) == (1797, "digits")
    with pytest.raises(UserError, match="of 8x8 pixels, the samples of 32x32"):
        open_reference("digits", load_network("pixels", None), (32, 32))


def test_open_reference_refuses_another_resolution_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", IMAGES)
    with pytest.raises(UserError, match=r"i.npz is of 8x8 pixels, the samples of 16x16; allowed: the same"):
        open_reference(tmp_path / "i.npz", COLOUR, (16, 16))
    write_statistics(tmp_path / "s.npz", measure_images(open_images(tmp_path / "i.npz"), COLOUR))
    with pytest.raises(UserError, match=r"s.npz is of 8x8 pixels, the samples of 16x16; allowed: the same"):
        open_reference(tmp_path / "s.npz", COLOUR, (16, 16))
    with pytest.raises(UserError, match=r"is of 8x8 pixels, the samples of 16x16; allowed: as large or larger"):
        open_reference(write_images(tmp_path / "data"), COLOUR, (16, 16))
    with pytest.raises(UserError, match=r"reference .*nothing does not exist"):
        open_reference(tmp_path / "nothing", COLOUR, (8, 8))


def test_read_statistics_refuses_bad_files_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"

    def refused(expected: str) -> None:
        with pytest.raises(UserError, match=expected) as problem:
            read_statistics(path)
        assert "\n" not in str(problem.value)

    np.savez(path, mean=EXPECTED.mean, sigma=EXPECTED.covariance)
    refused("has the entries mean, sigma; allowed: mu and sigma, or arr_0")
    np.savez(path, mu=EXPECTED.mean, sigma=EXPECTED.covariance[:2])
    refused(r"mu is \(3,\), sigma \(2, 3\); allowed: floats \[D\] and \[D, D\]")
    np.savez(path, mu=EXPECTED.mean * np.nan, sigma=EXPECTED.covariance)
    refused("mu or sigma is not finite")
    np.savez(path, mu=np.array([{}, 1], object), sigma=EXPECTED.covariance)
    refused("truncated or not an npz file of plain arrays")
    adm(path)
    path.write_bytes(path.read_bytes()[:-30])
    refused("truncated or not an npz file")


def test_stats_writes_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, weights = write_images(tmp_path / "data", size=16), save_classifier(tmp_path / "classifier0")
    options = ["--network", "classifier", "--network-weights", str(weights), "--device", "cpu"]
    command = ["stats", str(data), str(tmp_path / "s.npz"), "--size", "8", "--reference-images", "5", "--keep-images", *options]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "12 images of 8x8" in out
    assert "features of 5 images, and the images" in out
    expected = measure_images(open_images(data, size=8), tiny_network(tmp_path), kept=5)
    found, images = read_statistics(tmp_path / "s.npz")
    assert found is not None
    assert images is not None
    assert np.array_equal(found.moments.covariance, expected.moments.covariance)
    chosen = reference_indices(12, 5)
    assert np.array_equal(images.read(0, 5), open_images(data, size=8).read(0, 12)[chosen])
    assert (found.sha256, found.moments.count) == (tiny_network(tmp_path).sha256, 12)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"OUT": "s.txt"}, "OUT is {tmp}/s.txt; allowed: a name ending in .npz"),
        ({"OUT": "there.npz"}, "{tmp}/there.npz exists; choose another name or --overwrite"),
        ({"OUT": "no/s.npz"}, "{tmp}/no is not a directory; OUT is written into an existing one"),
        ({"DATA": "nothing"}, "{tmp}/nothing does not exist"),
        ({"DATA": "there.npz"}, "{tmp}/there.npz has the entries x; allowed: arr_0"),
        ({"--size": "0"}, "image size is 0; allowed: 1 or more"),
        ({"--batch-size": "0"}, "--batch-size is 0; allowed: 1 or more"),
        ({"--reference-images": "-1"}, "--reference-images is -1; allowed: 0 or more"),
        ({"--network": "inception"}, "the network 'inception' needs torch-fidelity"),
    ],
)
def test_stats_refuses_bad_values_and_writes_nothing(
    tmp_path: Path, changed: dict[str, str], expected: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    write_images(tmp_path / "data")
    np.savez(tmp_path / "there.npz", x=np.zeros(1))
    weights = save_classifier(tmp_path / "classifier0")
    values = {"DATA": "data", "OUT": "s.npz", "--network": "classifier", "--network-weights": str(weights)} | changed
    options = [word for key, value in values.items() if key.startswith("--") for word in (key, value)]
    before = sorted(os.listdir(tmp_path))
    assert main(["stats", str(tmp_path / values["DATA"]), str(tmp_path / values["OUT"]), *options, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected.format(tmp=tmp_path) in err.strip().splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == before
