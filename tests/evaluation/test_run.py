"""An evaluation gives the same numbers whoever computes it, however often it is killed, and says what it cannot do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from continuar.cli.main import main
from continuar.errors import UserError
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import FID_SHA256, FeatureNetwork
from continuar.evaluation.run import EvaluationOptions, evaluate
from continuar.evaluation.samples import GeneratedSamples, open_images
from continuar.pipeline import Pipeline
from continuar.statistics import moments
from tests.evaluation.tiny_networks import Halves, save_classifier, save_model, tiny_network
from tests.tiny import write_images

SETTINGS = {"steps": 2, "diffusion_steps": 2}
WORDS = ["--steps", "2", "--diffusion-steps", "2", "--device", "cpu", "--batch-size", "5", "--images", "21"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a classifier and real images of its size."""
    root = tmp_path_factory.mktemp("evaluation")
    save_model(root / "model")
    save_classifier(root / "classifier0")
    write_images(root / "data", per_class=20, classes=("ant", "bee", "cat"))
    return root


def command(place: Path, out: Path, *more: str) -> list[str]:
    network = ["--network", "classifier", "--network-weights", str(place / "classifier0")]
    return ["evaluate", str(place / "model"), "--reference", str(place / "data"), *network, *WORDS, "--out", str(out), *more]


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def samples_of(place: Path, count: int = 21, **settings: Any) -> GeneratedSamples:
    return GeneratedSamples(Pipeline.from_pretrained(place / "model", device="cpu"), count, settings=SETTINGS | settings)


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """An undisturbed evaluation by one process."""
    assert main(command(place, place / "done", "--save-images", "--neighbours", "3")) == 0
    return place / "done"


def test_evaluate_scores_the_images_of_the_model(place: Path, done: Path, capsys: pytest.CaptureFixture) -> None:
    pipe, network = Pipeline.from_pretrained(place / "model", device="cpu"), tiny_network(place)
    images = pipe([i % 3 for i in range(21)], 0, batch_size=21, **SETTINGS)
    real = open_images(place / "data").read(0, 60)
    found, expected = result(done), frechet_distance(moments(network(images).features_ND), moments(network(real).features_ND))
    assert found["scores"]["frechet_distance"] == pytest.approx(expected, rel=1e-2)  # other batches round otherwise by 1/255
    assert found["titles"]["frechet_distance"] == "Frechet distance (classifier)"
    names = {"inception_score", "inception_score_whole", "kernel_distance", "kernel_distance_std", "precision", "recall"}
    assert names | {"density", "coverage", "class_accuracy"} <= set(found["scores"])
    assert SETTINGS.items() <= found["samples"]["settings"].items()
    assert (
        found["samples"]["settings"]["guidance_scale"] == pipe.defaults.guidance_scale
    )  # the model's own are written down as well
    assert (found["samples"]["images"], found["samples"]["seed"], found["speed"]["images_made"]) == (21, 0, 21)
    assert (found["reference"]["images"], found["reference"]["images_of_precision_and_recall"]) == (60, 60)
    assert found["network"]["sha256"] == network.sha256
    saved = sorted((done / "images").iterdir())
    assert [p.name for p in saved] == [f"{i:06d}.png" for i in range(21)]
    differences = [np.abs(np.asarray(Image.open(p)).astype(int) - image).max() for p, image in zip(saved, images, strict=True)]
    assert max(differences) <= 1
    assert (done / "neighbours.png").is_file()
    assert (done / "samples.png").is_file()


def test_report_table_names_the_network_and_every_score(place: Path, done: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(place, done, "--save-images", "--neighbours", "3")) == 0
    out = capsys.readouterr().out
    for words in ("Frechet distance (classifier)", "kernel distance (classifier)", "all made before", "seed 0", "steps 2"):
        assert words in out
    assert "precision, recall" in out
    assert "FID" not in out
    assert "KID" not in out


def run_processes(count: int, words: list[str]) -> None:
    """The command line in real processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "continuar", *words],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    assert [p.returncode for p in started] == [0] * count, ended
    assert [bool(out) for out, _ in ended] == [True] + [False] * (count - 1)


def test_evaluate_by_two_processes_gives_the_numbers_of_one(place: Path, done: Path, tmp_path: Path) -> None:
    run_processes(2, command(place, tmp_path / "two", "--save-images"))
    one, two = result(done), result(tmp_path / "two")
    assert two["speed"]["processes"] == 2
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-6)
    for path in (done / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "images" / path.name).read_bytes()


def test_evaluate_continues_and_makes_only_missing_shards(
    place: Path, done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "again"
    shutil.copytree(done, out)
    (out / "result.json").unlink()
    (out / "shards" / "000001.json").unlink()  # killed before it was sealed
    data = bytearray((out / "shards" / "000003.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "shards" / "000003.safetensors").write_bytes(data)
    assert main(command(place, out, "--save-images")) == 0
    assert "000003.safetensors is damaged and made again" in caplog.text
    assert result(out)["speed"]["images_made"] == 10
    assert result(out)["scores"] == result(done)["scores"]


def test_evaluate_does_not_continue_other_settings(place: Path, done: Path, tmp_path: Path) -> None:
    network = tiny_network(place)
    with pytest.raises(UserError, match=r"holds an evaluation of other settings \(settings.steps: 2 -> 3"):
        evaluate(samples_of(place, steps=3), place / "data", network, done, options=EvaluationOptions(5, save_images=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(UserError, match="full is not empty; choose another directory"):
        evaluate(samples_of(place), place / "data", network, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["note"]


def test_evaluate_continues_a_job_of_version_0_1_0(place: Path, done: Path, tmp_path: Path) -> None:
    """Its names of settings are today's by other words."""
    out = tmp_path / "old"
    shutil.copytree(done, out)
    job = json.loads((out / "job.json").read_text())
    assert job["settings"]["engine"] == "fast"
    job["settings"]["guidance"] = job["settings"].pop("guidance_scale")
    job["settings"]["engine"] = "graphs"
    (out / "job.json").write_text(json.dumps(job))
    assert main(command(place, out, "--save-images")) == 0
    assert result(out)["speed"]["images_made"] == 0


def test_evaluate_records_engine_and_precision_in_the_job(
    place: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--save-images", "--neighbours", "3"]
    assert {"engine": "fast", "precision": "float32"}.items() <= result(done)["samples"]["settings"].items()  # what auto means
    assert main(command(place, done, *more, "--engine", "fast")) == 0
    assert "engine fast, precision float32" in capsys.readouterr().out
    for words, expected in (
        (["--engine", "eager"], 'settings.engine: "fast" -> "eager"'),
        (["--engine", "fast", "--precision", "bfloat16"], 'settings.precision: "float32" -> "bfloat16"'),
    ):
        assert main(command(place, done, *more, *words)) == 2
        assert expected in capsys.readouterr().err
    assert main(command(place, tmp_path / "eager", "--save-images", "--engine", "eager")) == 0
    assert result(tmp_path / "eager")["samples"]["settings"]["engine"] == "eager"
    pairs = [(np.asarray(Image.open(d / "images" / "000004.png")).astype(int)) for d in (done, tmp_path / "eager")]
    assert np.abs(pairs[0] - pairs[1]).max() <= 1
    assert main(command(place, tmp_path / "no", "--engine", "eager", "--precision", "bfloat16")) == 2
    assert "precision is 'bfloat16' with the eager engine" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    given = ["evaluate", "--images-from", str(place / "data"), "--reference", str(place / "data"), "--network", "pixels"]
    assert main([*given, "--engine", "eager", "--out", str(tmp_path / "no")]) == 2
    assert "sampling settings (engine); those are for a model" in capsys.readouterr().err


def test_evaluate_names_the_spatial_distance_sfid_only_with_the_fid_weights(place: Path, tmp_path: Path) -> None:
    network, samples = FeatureNetwork.from_module(Halves(), "halves"), samples_of(place)
    report = evaluate(samples, place / "data", network, tmp_path / "a", options=EvaluationOptions(5))
    assert report is not None
    images = np.concatenate([samples.make(first, 5) for first in range(0, 21, 5)])
    real = open_images(place / "data").read(0, 60)
    ours, theirs = network(images).spatial_NS, network(real).spatial_NS
    assert ours is not None
    assert theirs is not None
    assert report.scores.values["spatial_frechet_distance"] == pytest.approx(
        frechet_distance(moments(ours), moments(theirs)), rel=1e-5
    )
    assert report.scores.values["spatial_frechet_distance"] != pytest.approx(report.scores.values["frechet_distance"], rel=1e-2)
    assert report.to_json()["titles"]["spatial_frechet_distance"] == "spatial Frechet distance (halves)"
    # Against statistics in ADM's layout, which are of the FID weights: the same distance under its name, or a note.
    fid, mean, both = FeatureNetwork("inception", Halves(), FID_SHA256 + "00"), moments(real.mean((1, 2))), moments(theirs)
    np.savez(tmp_path / "adm.npz", mu=mean.mean, sigma=mean.covariance, mu_s=both.mean, sigma_s=both.covariance)
    np.savez(tmp_path / "without.npz", mu=mean.mean, sigma=mean.covariance)
    found = evaluate(samples, tmp_path / "adm.npz", fid, tmp_path / "b", options=EvaluationOptions(5))
    assert found is not None
    assert found.scores.values["spatial_frechet_distance"] == pytest.approx(
        report.scores.values["spatial_frechet_distance"], rel=1e-6
    )
    assert "\nsFID " in found.table()
    lacking = evaluate(samples, tmp_path / "without.npz", fid, tmp_path / "c", options=EvaluationOptions(5))
    assert lacking is not None
    assert "spatial_frechet_distance" not in lacking.scores.values
    assert any("no spatial Frechet distance (sFID)" in note for note in lacking.notes)


def test_evaluate_discards_shards(place: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(7, discard_shards=True, reference_images=10)
    report = evaluate(samples_of(place, 6), place / "data", tiny_network(place), tmp_path / "out", options=options)
    assert report is not None
    assert report.reference["images_of_precision_and_recall"] == 10
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"job.json", "result.json", "samples.png"}
    assert [n for n in report.notes if n.startswith("samples: 6 images for 8 features")]
    assert [n for n in report.notes if n.startswith("no inception score: 6 images for 10 splits")]


def test_evaluate_of_saved_images_scores_as_the_model_did(place: Path, done: Path, tmp_path: Path) -> None:
    """From PNGs, and from an npz in ADM's layout; equal sets are at distance 0 with precision and recall 1."""
    network = tiny_network(place)
    folder = open_images(done / "images")
    found = evaluate(folder, place / "data", network, tmp_path / "a", options=EvaluationOptions(5))
    assert found is not None
    expected = {k: v for k, v in result(done)["scores"].items() if k != "class_accuracy"}
    assert found.scores.values == pytest.approx(expected, rel=1e-6)
    np.savez(tmp_path / "i.npz", folder.make(0, 21))
    same = evaluate(open_images(tmp_path / "i.npz"), done / "images", network, tmp_path / "b")
    assert same is not None
    scores = same.scores.values
    trace = np.trace(moments(network(folder.make(0, 21)).features_ND).covariance)
    assert scores["frechet_distance"] <= 1e-6 * trace
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--images", "20"], "images is 20, which 3 classes do not divide; take 18 or 21"),
        (["--images", "0"], "images is 0; allowed: 2 or more"),
        (["--images", "2"], "images is 2, which 3 classes do not divide; take 3"),
        (["--batch-size", "0"], "batch size is 0; allowed: 1 or more"),
        (["--neighbours", "101"], "neighbours is 101; allowed: 0 to 100"),
        (["--neighbours", "22"], "neighbours is 22; allowed: 0 to 21, the number of images"),
        (["--reference", "nothing"], "reference nothing does not exist"),
        (["--reference", ""], "--reference is missing"),
        (["--reference", "{place}/large.npz"], "large.npz is of 16x16 pixels, the samples of 8x8; allowed: the same"),
        (["--reference", "{place}/empty.npz"], "empty.npz has the entries x; allowed: mu and sigma, or arr_0"),
        (["--network", "inception", "--network-weights", "nothing"], "network weights nothing do not exist"),
        (["--network-weights", "{place}/cut"], "model.safetensors is truncated or not a safetensors file"),
        (["--steps", "17"], "steps is 17; allowed: 1 to 16"),
        (["--out", "{place}/classifier0/config.json"], "config.json; allowed: a directory"),
        (["--images-from", "{place}/data"], "--images-from is given, and the model"),
    ],
)
def test_evaluate_refuses_bad_input_and_writes_nothing(
    place: Path, tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    np.savez(place / "large.npz", np.zeros((3, 16, 16, 3), np.uint8))
    np.savez(place / "empty.npz", x=np.zeros(1))
    cut = save_classifier(place / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    words = [w.format(place=place) for w in words]
    assert main(command(place, tmp_path / "out", *words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_contradictions(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--reference", str(place / "data"), "--network", "classifier", "--network-weights", str(place / "classifier0")]
    common += ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *common]) == 2
    assert "neither a model nor --images-from is given" in capsys.readouterr().err
    assert main(["evaluate", "--images-from", str(place / "data"), *common, "--steps", "3"]) == 2
    assert "--images-from is given, and sampling settings (steps)" in capsys.readouterr().err
    np.savez(place / "statistics.npz", np.zeros((2, 8, 8, 3), np.uint8))
    words = ["--neighbours", "1", "--reference", str(place / "statistics.npz"), "--images-from", str(place / "data" / "ant")]
    assert main(["evaluate", *common, *words]) == 2
    assert "neighbours need a reference with 4 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
