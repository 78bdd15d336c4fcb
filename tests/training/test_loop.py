"""Runs: their directory, resuming to the same bits, faults, and bad steps."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continuar.errors import UserError
from continuar.pipeline import newest_checkpoints
from continuar.training.config import EMAConfig, LoopConfig, OptimConfig
from continuar.training.step import TrainStep
from continuar.training.trainer import Interrupted, Report, train
from tests.tiny import model_configs, shaken, tiny_run, write_images

CPU = torch.device("cpu")
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(tiny_run(images, sample_images=48), directory, device=CPU)
    return directory


def same_bits(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    pair = [newest_checkpoints(run)[0] for run in (a, b)]
    tensors = [{f: load_file(p / f) for f in FILES} for p in pair]
    return pair[0].name == pair[1].name and all(
        tensors[0][f].keys() == tensors[1][f].keys() and all(torch.equal(v, tensors[1][f][k]) for k, v in tensors[0][f].items())
        for f in FILES
    )


def stop_after(step: int):
    def report(state: Report) -> None:
        if state.step == step:
            signal.raise_signal(signal.SIGINT)

    return report


def test_run_directory_holds_everything(undisturbed: Path) -> None:
    names = {p.name for p in undisturbed.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tensorboard", "samples", "checkpoints"}
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["skipped_steps"] == 0 and line["loss"] > 0 and 0.8 < line["token_std"] < 1.2 for line in lines)
    assert {p.name for p in (undisturbed / "samples").iterdir()} == {"step-00000006-ema.png", "step-00000006-raw.png"}
    assert [p.name for p in newest_checkpoints(undisturbed)] == ["step-00000006", "step-00000004"]
    assert list((undisturbed / "tensorboard").iterdir())
    assert json.loads((undisturbed / "config.json").read_text())["tokenizer"]["std"] > 0


@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_interrupted_run_resumes_to_the_same_bits(images: Path, undisturbed: Path, tmp_path: Path, step: int) -> None:
    run = tiny_run(images, sample_images=48)
    with pytest.raises(Interrupted) as stop:
        train(run, tmp_path / "r", device=CPU, on_report=stop_after(step))
    # The signal arrives after step `step` was reported, so one more step is finished before the checkpoint.
    assert stop.value.checkpoint.name == f"step-{step + 1:08d}"
    train(run, tmp_path / "r", device=CPU, resume=True)
    assert same_bits(tmp_path / "r", undisturbed)
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_a_run_cut_into_slices_ends_with_the_same_bits(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, directory, reached = tiny_run(images, sample_images=48), tmp_path / "r", 0
    for steps_in_slice in (1, 2, 9):
        clock = iter(range(100))
        train(run, directory, device=CPU, resume=True, should_stop=lambda c=clock, n=steps_in_slice: next(c) >= n - 1)
        reached = min(6, reached + steps_in_slice)
        assert newest_checkpoints(directory)[0].name == f"step-{reached:08d}"
    assert same_bits(directory, undisturbed)


def test_resuming_a_finished_run_changes_nothing(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_text()
    train(tiny_run(images, sample_images=48), undisturbed, device=CPU, resume=True)
    assert (undisturbed / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_loudly(
    images: Path, undisturbed: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(images, sample_images=48)
    train(run, tmp_path / "r", device=CPU)
    path = newest_checkpoints(tmp_path / "r")[0] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-100] if damage == "truncate" else data)
    train(run, tmp_path / "r", device=CPU, resume=True)
    assert "step-00000006 is damaged and passed over" in caplog.text
    assert same_bits(tmp_path / "r", undisturbed)


def test_a_run_whose_checkpoints_are_all_damaged_says_so(images: Path, tmp_path: Path) -> None:
    run = tiny_run(images, keep=1)
    train(run, tmp_path / "r", device=CPU)
    (newest_checkpoints(tmp_path / "r")[0] / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        train(run, tmp_path / "r", device=CPU, resume=True)


def test_another_run_is_not_overwritten_nor_mixed(images: Path, undisturbed: Path) -> None:
    run = tiny_run(images, sample_images=48)
    with pytest.raises(UserError, match="already holds a run; --resume continues it"):
        train(run, undisturbed, device=CPU)
    changed = dataclasses.replace(run, seed=5, optim=dataclasses.replace(run.optim, lr=0.5))
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.5; seed: 0 -> 5"):
        train(changed, undisturbed, device=CPU, resume=True)


def test_a_real_process_keeps_a_checkpoint_on_sigint_and_ends_with_the_same_bits(images: Path, tmp_path: Path) -> None:
    options = [
        *("--data.path", str(images), "--tokenizer.image-size", "8", "--sampling.steps", "2"),
        *("--sampling.head.diffusion-steps", "2"),
        *("--backbone.width", "16", "--backbone.heads", "2", "--backbone.encoder-depth", "1", "--backbone.decoder-depth", "1"),
        *(
            "--backbone.buffer",
            "2",
            "--sampling.head.diffusion-steps",
            "2",
            "--head.width",
            "16",
            "--head.depth",
            "1",
            "--train.batch-size",
            "8",
        ),
        *("--train.images", "4000", "--train.log-images", "800", "--train.sample-images", "0", "--device", "cpu"),
    ]
    command = [sys.executable, "-m", "continuar", "train", "folder", *options]
    subprocess.run([*command, "--out", str(tmp_path / "a")], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "b")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "b" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "checkpoint kept in" in errors
    assert "Traceback" not in errors
    subprocess.run([*command, "--out", str(tmp_path / "b"), "--resume"], check=True, capture_output=True)
    assert same_bits(tmp_path / "a", tmp_path / "b")


def bad_step() -> tuple[TrainStep, torch.Tensor, torch.Tensor]:
    config = model_configs()[0]
    run = dataclasses.replace(tiny_run("unused"), train=LoopConfig(batch_size=4))
    return TrainStep(shaken(config), run), torch.randn(4, 16, config.tokens.dim), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing_and_is_counted(value: float) -> None:
    step, tokens, labels = bad_step()
    step(0, lambda *_: (tokens, labels))
    weights = {k: v.clone() for k, v in step.model.state_dict().items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in step.optimizer.state.values()]
    for number in (1, 2):
        step(number, lambda *_: (tokens * value, labels))
    assert all(torch.equal(v, weights[k]) for k, v in step.model.state_dict().items())
    for before, after in zip(moments, step.optimizer.state.values(), strict=True):
        assert all(torch.equal(v, after[k]) for k, v in before.items())
    averages = step.meter.read()
    assert (averages.steps, averages.skipped, averages.bad_in_a_row) == (3, 2, 2)
    step(3, lambda *_: (tokens, labels))
    assert any(not torch.equal(v, weights[k]) for k, v in step.model.state_dict().items())
    assert step.meter.read().skipped == 0


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
def test_a_skipped_step_moves_no_average(device: str) -> None:
    config = model_configs()[0]
    run = dataclasses.replace(
        tiny_run("unused"), train=LoopConfig(batch_size=4), ema=EMAConfig(decay=0.9, snapshot_images=4), optim=OptimConfig(lr=0.1)
    )
    step = TrainStep(shaken(config).to(device), run)
    tokens, labels = torch.randn(4, 16, config.tokens.dim, device=device), torch.tensor([0, 1, 2, 0], device=device)
    for number in range(2):
        step(number, lambda *_: (tokens, labels))

    def averages() -> list[torch.Tensor]:
        return [x.detach().clone() for x in (*step.ema.model.parameters(), *step.averages.tensors.values())]

    before = averages()
    assert not torch.equal(next(step.model.parameters()), before[0])  # the averages have some way to go
    step(2, lambda *_: (tokens * torch.nan, labels))
    assert all(torch.equal(x, y) for x, y in zip(before, averages(), strict=True))
    step(3, lambda *_: (tokens, labels))
    assert not any(torch.equal(x, y) for x, y in zip(before, averages(), strict=True) if x.numel() > 1 and x.std() > 0)


def test_too_many_bad_steps_in_a_row_stop_with_advice(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(images, max_bad_steps=2)
    monkeypatch.setattr(
        "continuar.training.data.ImageStream.batch",
        lambda self, step, slot: (torch.full((8, 4, 48), torch.nan), torch.zeros(8, dtype=torch.int64)),
    )
    with pytest.raises(UserError, match=r"2 steps in a row had a non-finite loss or gradient; try a lower --optim.lr"):
        train(run, tmp_path / "r", device=CPU)


def test_training_says_when_a_given_std_is_off(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(images)
    run = dataclasses.replace(
        run, tokenizer=dataclasses.replace(run.tokenizer, std=5.0), train=LoopConfig(images=8, batch_size=8, sample_images=0)
    )
    train(run, tmp_path / "r", device=CPU)
    assert "not 1: tokenizer.std is 5.0000" in caplog.text
