"""Scores while a run trains: in the metrics, of both weights, within their share of the time, without a trace in the weights."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from continuar.data.loader import load_images
from continuar.errors import UserError
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import load_network
from continuar.pipeline import load, newest_checkpoints
from continuar.statistics import moments
from continuar.training import metrics as online_module
from continuar.training.config import OnlineConfig, Run
from continuar.training.trainer import train
from tests.evaluation.tiny_networks import save_classifier
from tests.tiny import tiny_run, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data", classes=("ant", "bee", "cat"))


def scored_run(images: Path, **online) -> Run:
    config = OnlineConfig(**({"every_images": 16, "samples": 9, "batch_size": 6, "max_share": 1.0} | online))
    return dataclasses.replace(tiny_run(images), online=config)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(online_module.time, "monotonic", lambda: self.now)


def test_scores_are_those_of_the_checkpoint_and_leave_no_trace(images: Path, tmp_path: Path) -> None:
    train(scored_run(images), tmp_path / "scored", device=CPU)
    train(tiny_run(images), tmp_path / "plain", device=CPU)
    weights = [newest_checkpoints(tmp_path / name)[0] for name in ("scored", "plain")]
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(p / f"{name}.safetensors") for p in weights)
        assert all(torch.equal(a[k], b[k]) for k in a)
    lines = metrics(tmp_path / "scored")
    assert [line["online/images"] for line in lines] == [16, 32, 48]
    assert not any(key.startswith("online/") for line in metrics(tmp_path / "plain") for key in line)
    network = load_network("pixels", None)
    real = moments(network(load_images(images, size=8).images).features_ND)
    for kind in ("ema", "raw"):
        pipe = load(tmp_path / "scored", weights=kind, device="cpu")
        samples = pipe([i % 3 for i in range(9)], list(range(9)), batch_size=6)
        expected = frechet_distance(moments(network(samples).features_ND), real)
        assert lines[-1][f"online/{kind}/frechet_distance"] == pytest.approx(expected, rel=0.02)


def test_a_classifier_says_how_many_are_what_was_asked_for(images: Path, tmp_path: Path) -> None:
    weights = save_classifier(tmp_path / "classifier")
    train(scored_run(images, network="classifier", weights=str(weights), every_images=48), tmp_path / "r", device=CPU)
    (line,) = [line for line in metrics(tmp_path / "r") if "online/images" in line]
    network = load_network("classifier", weights)
    samples = load(tmp_path / "r", device="cpu")([i % 3 for i in range(9)], list(range(9)), batch_size=6)
    logits = network(samples).logits_NC
    assert logits is not None
    assert line["online/ema/class_accuracy"] == pytest.approx((logits.argmax(1) == np.arange(9) % 3).mean(), abs=0.12)
    assert (tmp_path / "r" / "reference.npz").is_file()


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_scoring_keeps_to_its_share_and_is_put_off_rather_than_dropped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """A step takes a second, a batch of samples two; scores are always due."""
    clock, spent, made = Clock(monkeypatch), [0.0], []
    run = scored_run(images, every_images=8, samples=6, max_share=share)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, images=8 * 100, log_images=8, save_images=0))
    make = online_module.GeneratedSamples.make

    def slow(self, first: int, number: int) -> np.ndarray:
        clock.now += 2.0
        spent[0] += 2.0
        return make(self, first, number)

    def report(state) -> None:
        if "online/images" in state.metrics:
            made.append(state.step)
        if state.step > 1:
            assert spent[0] - 4.0 <= share * (clock.now - 4.0) + 1e-9  # two batches come before the first step
        clock.now += 1.0

    monkeypatch.setattr(online_module.GeneratedSamples, "make", slow)
    train(run, tmp_path / "r", device=CPU, on_report=report)
    # 4 seconds per score are a share of the steps and themselves.
    assert len(made) == pytest.approx(100 * share / (1 - share) / 4, abs=1.01)


def test_what_cannot_be_scored_is_refused_before_the_first_step(images: Path, tmp_path: Path) -> None:
    for changes, expected in (
        ({"samples": 10}, "online.samples is 10, which 3 classes do not divide; allowed: multiples of 3"),
        ({"network": "pixel"}, "unknown network 'pixel'; did you mean pixels"),
        ({"network": "squeezenet", "weights": "/nowhere"}, "network weights /nowhere do not exist"),
        ({"weights": "/nowhere"}, "the network 'pixels' has none"),
        ({"reference": "/nowhere"}, "reference /nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=expected):
            train(scored_run(images, **changes), tmp_path / "r", device=CPU)
        assert not (tmp_path / "r" / "config.json").exists()
    for changes, expected in (({"max_share": 0.0}, "max_share is 0.0"), ({"samples": 1}, "samples is 1; allowed: 2 or more")):
        with pytest.raises(UserError, match=expected):
            scored_run(images, **changes)


def test_a_resumed_run_keeps_its_reference(images: Path, tmp_path: Path) -> None:
    run = scored_run(images)
    train(run, tmp_path / "r", device=CPU, should_stop=iter([False, True]).__next__)
    before = (tmp_path / "r" / "reference.npz").stat().st_mtime_ns
    train(run, tmp_path / "r", device=CPU, resume=True)
    assert (tmp_path / "r" / "reference.npz").stat().st_mtime_ns == before
    assert [line.get("online/images") for line in metrics(tmp_path / "r")] == [16, 32, 48]
