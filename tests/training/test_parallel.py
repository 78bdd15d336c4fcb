"""Several processes train what one does: real processes, gloo, float32."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continuar.checkpoints.sharded import read_full
from continuar.distributed import DDP, FSDP, Kind, SingleProcess, gathered_state, joined, local_device
from continuar.errors import UserError
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.training.config import EMAConfig, Run
from continuar.training.step import TrainStep
from continuar.training.trainer import train
from tests.processes import group
from tests.tiny import tiny_run, write_images

CPU = torch.device("cpu")
WEIGHTS = ("model.safetensors", "ema.safetensors")
KINDS: tuple[Kind, ...] = ("ddp", "fsdp")


def run_of(images: Path, micro_batch: int = 4, activation_checkpointing: bool = False) -> Run:
    """Twelve steps of 8 images, the loss of each written, with checkpoints after 6 and 12."""
    run = tiny_run(
        images, images=96, log_images=8, save_images=48, micro_batch=micro_batch, activation_checkpointing=activation_checkpointing
    )
    return replace(run, ema=EMAConfig(decay=0.9, snapshot_images=96))


def halved(source: Path, destination: Path) -> None:
    """A copy of a finished run as it was after its first checkpoint."""
    shutil.copytree(source, destination)
    shutil.rmtree(newest_checkpoints(destination)[0])


def skipping(images: Path, parallel: SingleProcess) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """Four steps, in the second of which micro-batch 1 (that of process 1, where there are two) is not a number."""
    torch.manual_seed(0)
    trainer = TrainStep(run_of(images).model_config(2).build(), run_of(images), parallel)

    def stream(step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randn(4, 4, 48, generator=torch.Generator().manual_seed(10 * step + slot))
        return tokens * (torch.nan if (step, slot) == (1, 1) else 1), torch.zeros(4, dtype=torch.int64)

    for step in range(4):
        trainer(step, stream)
    averages = trainer.meter.read()
    return gathered_state(trainer.model, parallel), (averages.steps, averages.skipped)


def pair(root: Path, images: Path) -> None:
    """What each of two processes does for all tests below: one group, because starting one is what takes the time."""
    with joined("ddp", CPU) as replicated:
        assert isinstance(replicated, DDP)
        flat = torch.tensor([1.0, 5.0]) * (1 + 2 * replicated.rank)
        replicated.average(flat)
        assert flat.tolist() == [2.0, 10.0]
        kinds = {"ddp": replicated, "fsdp": FSDP(CPU, replicated.heartbeat)}
        for kind, parallel in kinds.items():
            for micro_batch in (4, 2):
                train(run_of(images, micro_batch), root / f"{kind}-{micro_batch}", device=CPU, parallel=parallel)
            train(run_of(images, activation_checkpointing=True), root / f"{kind}-recompute", device=CPU, parallel=parallel)
            state, counts = skipping(images, parallel)
            if parallel.first:
                save_file(state, root / f"{kind}-skipping.safetensors")
                (root / f"{kind}-skipping.json").write_text(json.dumps(counts))
        for old in kinds:
            for new, parallel in kinds.items():
                directory = root / f"{old}-then-{new}"
                if parallel.first:
                    halved(root / f"{old}-4", directory)
                parallel.most(0)
                train(run_of(images, 0), directory, device=CPU, parallel=parallel, resume=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, and of one with the same micro-batches."""
    root = tmp_path_factory.mktemp("runs")
    assert group(2, pair, root, images) == [0, 0]
    for micro_batch in (4, 2):
        train(run_of(images, micro_batch), root / f"one-{micro_batch}", device=CPU)
    return root


def curve(run: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    last = [value for name, value in lines[-1].items() if name.startswith("loss_by_")]
    assert len(last) == 5  # quarters of time, and the masked share of that step
    return torch.tensor([*(line[k] for line in lines for k in ("loss", "gradient_norm", "token_std")), *last])


def check_same_run(found: Path, expected: Path) -> None:
    """The same losses and gradient norms at every step and the same weights at the end, within rounding."""
    torch.testing.assert_close(curve(found), curve(expected), rtol=2e-5, atol=0)
    averages = "averages/step-00000012.safetensors"
    for file in (*WEIGHTS, averages):
        folders = [run if file == averages else newest_checkpoints(run)[0] for run in (found, expected)]
        states = [load_file(folder / file) for folder in folders]
        assert states[0].keys() == states[1].keys()
        for name, value in states[1].items():
            rounding = {"rtol": 2e-3, "atol": 1e-4} if value.dtype == torch.float16 else {"rtol": 1e-3, "atol": 2e-5}
            torch.testing.assert_close(states[0][name], value, **rounding)


@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_loss_curve_of_one(runs: Path, kind: str, micro_batch: int) -> None:
    check_same_run(runs / f"{kind}-{micro_batch}", runs / f"one-{micro_batch}")


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_recomputed_change_nothing(runs: Path, kind: str) -> None:
    check_same_run(runs / f"{kind}-recompute", runs / "one-4")


def test_the_micro_batch_is_the_unit_of_randomness(runs: Path) -> None:
    # What the comparison above would see if processes drew other numbers.
    assert not torch.allclose(curve(runs / "one-4"), curve(runs / "one-2"), rtol=1e-3)


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_a_run_is_resumed_by_other_kinds_of_processes(runs: Path, old: str, new: str) -> None:
    check_same_run(runs / f"{old}-then-{new}", runs / "one-4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_is_resumed_by_one(runs: Path, images: Path, tmp_path: Path, kind: str) -> None:
    halved(runs / f"{kind}-4", tmp_path / "run")
    train(run_of(images, 0), tmp_path / "run", device=CPU, resume=True)
    check_same_run(tmp_path / "run", runs / "one-4")
    # The micro-batch the run began with is kept, though nobody asks for it, and so are the draws.
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["micro_batch"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_the_same_way_gives_the_same_bits(runs: Path, kind: str) -> None:
    pair = [newest_checkpoints(runs / name)[0] for name in (f"{kind}-4", f"{kind}-then-{kind}")]
    for file in WEIGHTS:
        undisturbed, resumed = (load_file(checkpoint / file) for checkpoint in pair)
        assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_shards_are_a_model_that_can_be_loaded(runs: Path, tmp_path: Path) -> None:
    newest, before = newest_checkpoints(runs / "fsdp-4")
    assert not (before / "model.safetensors").exists()
    for group_name, file in zip(("model.", "ema."), WEIGHTS, strict=True):
        joined_up, consolidated = read_full(newest, group_name), load_file(newest / file)
        assert joined_up.keys() == consolidated.keys()
        assert all(torch.equal(value, joined_up[name]) for name, value in consolidated.items())
    pipe = Pipeline.from_pretrained(before, device="cpu")
    expected = Pipeline.from_pretrained(newest_checkpoints(runs / "ddp-4")[1], device="cpu")
    torch.testing.assert_close(pipe.model.state_dict(), expected.model.state_dict(), rtol=1e-3, atol=2e-5)
    pipe.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}


def test_a_damaged_shard_is_noticed(runs: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(runs / "fsdp-4", tmp_path / "run")
    shard = sorted((newest_checkpoints(tmp_path / "run")[0] / "shards").glob("shard-00002-*"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    train(run_of(images, 0), tmp_path / "run", device=CPU, resume=True)
    assert "step-00000012 is damaged and passed over" in caplog.text
    assert shard.name in caplog.text
    check_same_run(tmp_path / "run", runs / "one-4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_micro_batch_of_one_process_is_skipped_by_all_alike(runs: Path, images: Path, kind: str) -> None:
    expected, counts = skipping(images, SingleProcess())
    assert counts == (4, 1)
    assert tuple(json.loads((runs / f"{kind}-skipping.json").read_text())) == counts
    found = load_file(runs / f"{kind}-skipping.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


def of_world(world: int) -> SingleProcess:
    parallel = SingleProcess()
    parallel.world = world
    return parallel


def test_processes_that_do_not_divide_the_batch_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 processes for a batch of 8; allowed: a number of processes that divides it"):
        train(run_of(images, 0), tmp_path / "run", device=CPU, parallel=of_world(3))
    with pytest.raises(UserError, match=r"4 processes for 2 micro-batches per step; allowed: .* divides 2, or another train"):
        train(run_of(images, 4), tmp_path / "run", device=CPU, parallel=of_world(4))
    with pytest.raises(UserError, match=r"train.micro_batch is 3; allowed: a divisor of the batch size 8"):
        run_of(images, 3)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_done_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--parallel fsdp spreads weights over processes; start them"), joined("fsdp", CPU):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot share the device 'mps'"):
        local_device(torch.device("mps"))
    with pytest.raises(UserError, match=r"device is 'cuda:0' for .* processes; allowed: cuda"):
        local_device(torch.device("cuda", 0))
