"""Results that travel: compact weights, the record, and another machine that goes on from them."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shipping.kept import Folders, Record, restore
from shipping.planning import continuation
from shipping.work import export

import continuar
from continuar.checkpoints.store import read_json, read_tensors
from continuar.configs import from_json, to_json
from continuar.errors import UserError
from continuar.pipeline import newest_checkpoints
from continuar.training.config import Run
from continuar.training.loop import train
from tests.tiny import tiny_run, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def first(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A machine that was lost after step 5 of 6: the newest checkpoint is of step 4, metrics were written at steps 2 and 4."""
    root = tmp_path_factory.mktemp("first")
    folders, run = Folders(root / "work", root / "results"), tiny_run(images)
    record = Record(run=to_json(run), segments=[{"origin": "initial weights", "images": 0}])
    train(run, folders.run, device=CPU, should_stop=iter([False] * 3 + [True]).__next__)
    assert folders.take_checkpoint(record, "") == "step-00000004"
    with (folders.run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "images": 40, "images_per_second": 1.0}) + '\n{"torn')
    folders.publish(record)
    return folders


def test_results_hold_both_weights_in_half_the_size_and_the_metrics(first: Folders) -> None:
    assert {p.name for p in first.results.iterdir()} == {"ema.safetensors", "raw.safetensors", "metrics.jsonl", "record.json"}
    checkpoint = newest_checkpoints(first.run)[0]
    for name, source in (("ema", "ema.safetensors"), ("raw", "model.safetensors")):
        kept, full = read_tensors(first.results / f"{name}.safetensors"), read_tensors(checkpoint / source)
        assert all(torch.equal(kept[k], v.bfloat16()) for k, v in full.items())
        assert continuar.load(first.model(name), device="cpu")([0], 0).shape == (1, 8, 8, 3)
    lines = [json.loads(line) for line in (first.results / "metrics.jsonl").read_text().splitlines()]
    assert [(line["segment"], line["images"]) for line in lines] == [(0, 16), (0, 32), (0, 40)]


def test_another_machine_goes_on_from_results(first: Folders, tmp_path: Path) -> None:
    folders = Folders(tmp_path / "work", tmp_path / "results")
    (folders.run / "checkpoints").mkdir(parents=True)  # of a restore that was cut off: there is no record
    record = restore(first.results, folders)
    run = continuation(from_json(Run, record.run), 1, rewarm_images=16)
    run = replace(run, train=replace(run.train, images=16))
    checkpoint = newest_checkpoints(folders.run)[0]
    assert all(torch.equal(v.bfloat16(), read_tensors(first.results / "ema.safetensors")[k]) for k, v in ema(checkpoint).items())
    assert (record.images, record.images_before) == (32, 32)

    train(run, folders.run, device=CPU, resume=True, force=True)
    folders.take_checkpoint(record, "")
    assert (record.images, record.images_before) == (48, 32)
    lines = folders.metrics(record)
    assert [(line["segment"], line["images"]) for line in lines] == [(0, 16), (0, 32), (1, 48)]  # 40 was lost
    assert Record.load(folders.results / "record.json") == record
    # The first step of a warm-up has rate 0; the average keeps 9/10 of itself per step from the start.
    moved = ema(newest_checkpoints(folders.run)[0])["condition.embedding"] - ema(checkpoint)["condition.embedding"]
    assert 0 < moved.abs().max() < 1e-3


def ema(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint / "ema.safetensors")


def test_averaged_weights_alone_are_enough_to_go_on(first: Folders, tmp_path: Path) -> None:
    (tmp_path / "carried").mkdir()
    for name in ("ema.safetensors", "record.json"):
        (tmp_path / "carried" / name).write_bytes((first.results / name).read_bytes())
    folders = Folders(tmp_path / "work", tmp_path / "results")
    record = restore(tmp_path / "carried", folders)
    assert "the averaged ones for both" in record.segments[-1]["origin"]
    checkpoint = newest_checkpoints(folders.run)[0]
    assert (checkpoint / "model.safetensors").read_bytes() == (checkpoint / "ema.safetensors").read_bytes()


def exported(first: Folders, to: Path, *assignments: str, weights: str = "ema") -> None:
    export(Namespace(results=first.results, to=to, weights=weights, set=assignments))


def test_exported_models_are_found_by_name_with_their_defaults(
    first: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    exported(first, tmp_path / "models" / "tiny", "sampling.guidance=1.25", "sampling.steps=3")
    assert "32 images, ema weights" in capsys.readouterr().out
    monkeypatch.setattr("continuar.pipeline.SHIPPED", tmp_path / "models")
    pipe = continuar.load("tiny", device="cpu")
    assert (pipe.defaults.guidance, pipe.defaults.steps, pipe.classes) == (1.25, 3, ("ant", "bee"))
    assert {p.name for p in (tmp_path / "models" / "tiny").iterdir()} == {"config.json", "model.safetensors"}
    assert all(v.dtype == torch.bfloat16 for v in read_tensors(tmp_path / "models" / "tiny" / "model.safetensors").values())


def test_export_refuses_and_keeps_what_stands_there(first: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "model"
    exported(first, to)
    before = read_json(to / "config.json")
    with pytest.raises(UserError, match=r"unknown field 'sampling\.guidence'"):
        exported(first, to, "sampling.guidence=2")
    monkeypatch.setattr("shipping.work.MAX_MODEL_BYTES", 1000)
    with pytest.raises(UserError, match=r"the model takes .* MB in bfloat16; allowed"):
        exported(first, to, "sampling.guidance=2")
    assert read_json(to / "config.json") == before
