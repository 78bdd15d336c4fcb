"""Faults, each by really doing it: processes that are killed or told to end, full disks, weights that are not numbers."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continuar.checkpoints.sharded import read_full
from continuar.cli.main import main
from continuar.distributed import TIMEOUT_VARIABLE, Kind, joined, raise_on_all_ranks, timeout
from continuar.errors import UserError
from continuar.pipeline import newest_checkpoints
from continuar.training.config import Run
from continuar.training.metrics import RunLog
from continuar.training.step import TrainStep
from continuar.training.trainer import Report, train
from tests.processes import finish, free_port, group, quiet, start, wait_for
from tests.tiny import tiny_run, write_images

CPU = torch.device("cpu")
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


def same_bits(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    pair = [newest_checkpoints(run)[0] for run in (a, b)]
    states = [{f"{f}/{k}": v for f in FILES for k, v in load_file(p / f).items()} for p in pair]
    same = states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    return same and pair[0].name == pair[1].name


# --- killed ---


def long_run(images: Path) -> Run:
    """60 steps, a checkpoint after every third."""
    return tiny_run(images, images=480, log_images=8, save_images=24)


def trained(directory: Path, images: Path) -> None:
    train(long_run(images), directory, device=CPU, resume=True)


def metric_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_again_and_again(run: Path, images: Path, steps: list[int]) -> None:
    """Kills the run when it has written so many steps, and resumes it, until the list is at its end and the run at its."""
    for step in steps:
        process = start(trained, run, images)
        wait_for(lambda step=step: metric_lines(run) >= step)
        process.kill()
        assert finish([process]) == [-signal.SIGKILL]
    assert finish([start(trained, run, images)]) == [0]


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(long_run(images), run, device=CPU)
    return run


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    undisturbed: Path, images: Path, tmp_path: Path, times: int
) -> None:
    steps = sorted(random.Random(times).sample(range(1, 55), times))
    kill_again_and_again(tmp_path / "run", images, steps)
    assert same_bits(tmp_path / "run", undisturbed)
    assert metric_lines(tmp_path / "run") == 60
    # What a killed process left half-written is gone.
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob(".*")] == []


def log_opened_and_killed(run: Path) -> None:
    """Opens the log of a resumed run, and is killed when the shortened file is about to be renamed."""

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", kill)
        RunLog(run, step=2)


def test_metrics_outlive_a_kill_while_a_resumed_run_cuts_them(tmp_path: Path) -> None:
    text = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert finish([start(log_opened_and_killed, tmp_path)]) == [-signal.SIGKILL]
    assert (tmp_path / "metrics.jsonl").read_text() == text
    RunLog(tmp_path, step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == text[: text.index('{"step": 3')]


def trained_together(directory: Path, images: Path) -> None:
    with joined("fsdp", CPU) as parallel:
        train(long_run(images), directory, device=CPU, resume=True, parallel=parallel)


@pytest.mark.slow
def test_processes_killed_together_end_with_the_same_bits(images: Path, tmp_path: Path) -> None:
    assert group(2, trained_together, tmp_path / "undisturbed", images) == [0, 0]
    for step in (5, 20, 41):
        port = free_port()
        started = [start(trained_together, tmp_path / "run", images, rank=r, world=2, port=port) for r in range(2)]
        wait_for(lambda step=step: metric_lines(tmp_path / "run") >= step)
        for process in started:
            process.kill()
        assert finish(started) == [-signal.SIGKILL] * 2
    assert group(2, trained_together, tmp_path / "run", images) == [0, 0]
    pair = [newest_checkpoints(tmp_path / name)[0] for name in ("run", "undisturbed")]
    for name in ("model.", "ema.", "optimizer."):
        found, expected = (read_full(checkpoint, name) for checkpoint in pair)
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


# --- told to end ---

SIZES = [
    *("--tokenizer.image-size", "8", "--backbone.width", "16", "--backbone.heads", "2", "--backbone.encoder-depth", "1"),
    *("--backbone.decoder-depth", "1", "--backbone.buffer", "2", "--head.width", "16", "--head.depth", "1"),
    *("--train.batch-size", "8", "--train.sample-images", "0", "--sampling.steps", "2", "--device", "cpu"),
]
"""Options of recipe `folder` for a tiny model."""


def command(images: Path, run: Path, *more: str, count: int = 100_000) -> list[str]:
    logged = ["--train.images", str(count), "--train.log-images", "40", "--train.save-images", "0"]
    return ["train", "folder", "--data.path", str(images), "--out", str(run), *SIZES, *logged, *more]


def told(arguments: list[str], output: Path) -> int:
    quiet(output)
    return main(arguments)


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_exits_well(images: Path, tmp_path: Path, world: int) -> None:
    run, port = tmp_path / "run", free_port()
    ranks = [None] if world == 1 else [0, 1]
    started = [start(told, command(images, run), tmp_path / f"{r}", rank=r, world=world, port=port) for r in ranks]
    wait_for(lambda: metric_lines(run) >= 2)
    # One of the processes is told; all stop at the same step.
    started[-1].terminate()
    assert finish(started) == [0] * world
    step = int(newest_checkpoints(run)[0].name.removeprefix("step-"))
    said = " ".join((tmp_path / f"{ranks[0]}").read_text().split())
    assert f"stopped on request at step {step:,} of 12,500" in said
    assert "Traceback" not in said


def test_torchrun_starts_the_processes_of_a_run(images: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(images, tmp_path / "run", "--parallel", "fsdp", count=160)
    done = subprocess.run([*torchrun, "-m", "continuar", *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained: ") == 1
    assert metric_lines(tmp_path / "run") == 4
    assert main(["sample", str(tmp_path / "run"), "--classes", "0", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0


# --- others that die, or cannot be found ---


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_when_a_process_dies_the_others_stop_and_say_why(images: Path, tmp_path: Path, kind: str) -> None:
    run, port = tmp_path / "run", free_port()
    arguments = command(images, run, "--parallel", kind)
    started = [start(told, arguments, tmp_path / f"{r}", rank=r, world=2, port=port) for r in range(2)]
    wait_for(lambda: metric_lines(run) >= 2)
    started[1].kill()
    assert finish(started, seconds=60) == [2, -signal.SIGKILL]
    said = (tmp_path / "0").read_text()
    assert "process 0 lost another process of the run" in said
    assert "Traceback" not in said


LIMIT = 3.0
"""Seconds after which collectives fail in the tests below."""


def trained_with_a_short_limit(run: Path, images: Path, output: Path, kind: Kind, hangs: int | None) -> int:
    """Process ``hangs`` stays alive in step 3 for ever, and does not come to the next collective."""
    quiet(output)
    os.environ[TIMEOUT_VARIABLE] = str(LIMIT)

    def report(state: Report) -> None:
        if parallel.rank == hangs and state.step == 3:
            time.sleep(1000)

    try:
        with joined(kind, CPU) as parallel:
            train(tiny_run(images, images=100_000, log_images=8), run, device=CPU, on_report=report, parallel=parallel)
    except UserError as problem:
        print(problem)
        return 2
    return 0


@pytest.mark.parametrize(("kind", "stopped"), [("ddp", 1), ("ddp", 0), ("fsdp", 1)])
def test_a_stopped_process_ends_the_others_and_they_name_it(images: Path, tmp_path: Path, kind: str, stopped: int) -> None:
    run, port = tmp_path / "run", free_port()
    started = [
        start(trained_with_a_short_limit, run, images, tmp_path / f"{r}", kind, None, rank=r, world=2, port=port) for r in range(2)
    ]
    wait_for(lambda: metric_lines(run) >= 2)
    os.kill(started[stopped].pid or 0, signal.SIGSTOP)
    codes = finish([started[1 - stopped]])
    started[stopped].kill()
    assert codes == [2], (tmp_path / f"{1 - stopped}").read_text()
    said = (tmp_path / f"{1 - stopped}").read_text()
    assert f"process {1 - stopped} lost another process of the run: process {stopped}" in said
    assert "the same command with --resume continues from the last checkpoint (CONTINUAR_TIMEOUT=SECONDS waits longer)" in said


def test_a_process_that_lives_but_hangs_ends_the_others_and_they_name_it(images: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    started = [
        start(trained_with_a_short_limit, run, images, tmp_path / f"{r}", "ddp", 1, rank=r, world=4, port=port) for r in range(4)
    ]
    codes = finish([started[r] for r in (0, 2, 3)])
    started[1].kill()
    assert codes == [2] * 3, (tmp_path / "0").read_text()
    for rank in (0, 2, 3):
        assert f"process 1 hung: alive, but no answer for {LIMIT:g} s" in (tmp_path / f"{rank}").read_text()


def slow_alone(output: Path, ends: str) -> int:
    """Process 1 works three times as long as a collective may take, before a point where the others wait for it."""
    quiet(output)
    os.environ[TIMEOUT_VARIABLE] = str(LIMIT)
    try:
        with joined("ddp", CPU) as parallel:
            with raise_on_all_ranks(parallel):
                if parallel.rank == 1:
                    time.sleep(3 * LIMIT if ends == "well" else LIMIT / 3)
                    if ends == "stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
            assert parallel.share_object([parallel.rank]) == [0]
    except UserError as problem:
        print(problem)
        return 2
    return 0


@pytest.mark.parametrize("ends", ["well", "stopped"])
def test_long_work_of_one_process_is_waited_for_as_long_as_it_lives(tmp_path: Path, ends: str) -> None:
    port = free_port()
    started = [start(slow_alone, tmp_path / f"{r}", ends, rank=r, world=2, port=port) for r in range(2)]
    if ends == "well":
        assert finish(started) == [0, 0]
    else:
        codes = finish(started[:1])
        started[1].kill()
        assert codes == [2]
        assert "process 1 died, was stopped, or lost its machine" in (tmp_path / "0").read_text()


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("soon", "0", "nan"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, value)
        with pytest.raises(UserError, match=f"{TIMEOUT_VARIABLE} is '{value}'; allowed: seconds, above 0"):
            timeout()


def test_a_port_that_is_taken_is_one_clear_line(images: Path, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        process = start(told, command(images, tmp_path / "run"), tmp_path / "said", rank=0, world=2, port=port)
        assert finish([process]) == [2]
    last = (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert last.startswith(f"continuar: error: port 127.0.0.1:{port} is taken; allowed: another one")
    assert not (tmp_path / "run").exists()


# --- disks that are full ---


def trained_on_a_full_disk(directory: Path, images: Path, output: Path, kind: Kind, full: int) -> int:
    """Of process ``full`` no file may grow beyond a few kilobytes after step 7: the checkpoint after step 9 fails."""
    quiet(output)
    with joined(kind, CPU) as parallel:

        def report(state: Report) -> None:
            if state.step == 7 and parallel.rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        try:
            train(long_run(images), directory, device=CPU, on_report=report, parallel=parallel)
        except UserError as problem:
            print(problem)
            return 2
    return 0


def test_a_full_disk_keeps_the_last_good_checkpoint(undisturbed: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finish([start(trained_on_a_full_disk, run, images, tmp_path / "said", "ddp", 0)]) == [2]
    assert "the checkpoint of step 9 could not be written" in (said := (tmp_path / "said").read_text())
    assert "step-00000006 is intact, and --resume continues from it" in said
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}
    trained(run, images)
    assert same_bits(run, undisturbed)


def test_a_full_disk_of_one_process_stops_all_and_leaves_nothing_half_written(images: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    said = [tmp_path / "0", tmp_path / "1"]
    started = [start(trained_on_a_full_disk, run, images, said[r], "fsdp", 1, rank=r, world=2, port=port) for r in range(2)]
    assert finish(started) == [2, 2]
    for path in said:
        assert "the checkpoint of step 9 could not be written" in path.read_text()
        assert "process 1 could not write its shard" in path.read_text()
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}


# --- numbers that are none ---


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int, times: int) -> list[int]:
    """Makes a weight not a number before step ``at``, the first ``times`` times; returns the steps at which it was done."""
    take, done = TrainStep.__call__, []

    def step(self: TrainStep, number: int, stream) -> None:
        if number == at and len(done) < times:
            done.append(number)
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[3] = torch.nan
        take(self, number, stream)

    monkeypatch.setattr(TrainStep, "__call__", step)
    return done


def test_weights_that_are_not_numbers_go_back_to_the_last_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(images, images=96, log_images=8, save_images=24, max_bad_steps=4)
    done = poisoned(monkeypatch, at=7, times=1)
    train(run, tmp_path / "run", device=CPU)
    # Found when the checkpoint after step 9 was due, before four steps in a row were bad.
    assert done == [7]
    assert (
        "after step 9 weights are not finite numbers: back to step 6, with other draws from there (rollback 1 of 3)" in caplog.text
    )
    for file in FILES:
        assert all(v.isfinite().all() for v in load_file(newest_checkpoints(tmp_path / "run")[0] / file).values())
    assert metric_lines(tmp_path / "run") == 12
    # The way it took is kept: a resumed run takes it, too.
    before = load_file(newest_checkpoints(tmp_path / "run")[0] / "model.safetensors")
    shutil.rmtree(newest_checkpoints(tmp_path / "run")[0])
    train(run, tmp_path / "run", device=CPU, resume=True)
    after = load_file(newest_checkpoints(tmp_path / "run")[0] / "model.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_bad_steps_in_a_row_go_back_further_each_time_and_not_for_ever(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(images, images=160, log_images=8, save_images=32, max_bad_steps=2, max_rollbacks=2)
    poisoned(monkeypatch, at=13, times=99)
    with pytest.raises(UserError, match=r"2 steps in a row .* went back 2 times before \(train.max_rollbacks is 2\); try a lower"):
        train(run, tmp_path / "run", device=CPU)
    assert [line.split(": ")[1][:15] for line in caplog.text.splitlines() if "rollback" in line] == [
        "back to step 12",
        "back to step 8,",
    ]
    # The second time a checkpoint after step 12 was written again, and is good.
    assert newest_checkpoints(tmp_path / "run")[0].name == "step-00000012"


# --- what is kept ---


def test_milestones_are_kept_beside_the_newest(images: Path, tmp_path: Path) -> None:
    run = tiny_run(images, images=96, save_images=16, keep=1, milestone_images=40)
    train(run, tmp_path / "run", device=CPU)
    assert [p.name for p in newest_checkpoints(tmp_path / "run")] == ["step-00000012", "step-00000010", "step-00000005"]
