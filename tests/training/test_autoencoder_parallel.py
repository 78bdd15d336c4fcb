"""Several processes train the tokenizer that one does: real processes, gloo, float32."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from continuar.checkpoints.tokenizers import load_tokenizer
from continuar.cli.main import main
from continuar.distributed import SingleProcess, joined
from continuar.errors import UserError
from continuar.recipes.tokenizers import TOKENIZER_RECIPES
from continuar.training import checkpoint as checkpoints
from continuar.training.autoencoder import (
    MemoryBatches,
    TokenizerStep,
    open_images,
    pick_engine,
    train_tokenizer,
)
from continuar.training.checkpoint import run_checkpoints
from continuar.training.config import CodebookLearning, DiscriminatorConfig, ImagesConfig, OptimConfig, TokenizerRun
from continuar.training.gan_losses import Perceptual
from continuar.training.trainer import Report
from tests.processes import finish, free_port, group, quiet, start, wait_for
from tests.tiny import write_images
from tests.tokenizers.networks import images
from tests.training.tiny_tokenizers import tiny_run

CPU = torch.device("cpu")
STEPS = 6
BAD = 3
"""The step at which the last image of the batch, which is the last process's, is spoilt."""
CODEBOOKS = {
    "kl": None,
    "ema": CodebookLearning(revive_below=0.0),
    "ema-revived": CodebookLearning(),
    "gradient": CodebookLearning(update="gradient", revive_below=0.0),
    "gradient-revived": CodebookLearning(update="gradient"),
}
SPOILT = ("batch", "loss")


def run_of(path: Path | str, name: str, **changes: Any) -> TokenizerRun:
    """A discriminator joins after two steps, and gradients are clipped."""
    optim = OptimConfig(lr=1e-3, betas=(0.5, 0.9), weight_decay=0.0, clip=0.3)
    return tiny_run(path, "kl" if name == "kl" else "vq", codebook=CODEBOOKS[name], optim=optim, **changes)


@contextmanager
def without_draws() -> Iterator[None]:
    """The posterior's mean is taken, and dead codes are revived by the first vectors: what does not depend on who draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        patch.setattr(torch, "randint", lambda high, size, device: torch.arange(size[0], device=device))
        yield


class Infinite(Perceptual):
    """A distance that is infinite for images beyond 50, without a gradient: of all that is tested the loss alone is not finite."""

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        return [images_B3HW]

    def forward(self, images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
        far = targets_B3HW.flatten(1).amax(1) > 50
        return 0 * images_B3HW.flatten(1).sum(1) + torch.zeros(len(far)).masked_fill(far, torch.inf)


def taken(run: TokenizerRun, parallel: SingleProcess, spoilt: str = "") -> tuple[dict[str, Tensor], dict[str, float]]:
    """Some steps, each process's part of the same batches: all that is learned, and what was measured."""
    torch.manual_seed(parallel.rank)  # all begin with the first process's weights
    trainer = TokenizerStep(run.tokenizer.build(), run, Infinite() if spoilt == "loss" else None, parallel)
    part = parallel.part(run.train.batch_size)
    for step in range(STEPS):
        batch = images(run.train.batch_size, seed=step)
        if step == BAD and spoilt:
            batch[-1, 0, 0, 0] = torch.nan if spoilt == "batch" else 100
        trainer.seed(step)
        trainer(step, batch[part.start : part.stop])
    averages = trainer.meter.read()
    modules = {"tokenizer": trainer.tokenizer, "discriminator": trainer.discriminator, "codebook": trainer.codebook}
    state = {f"{name}.{k}": v for name, m in modules.items() if m is not None for k, v in m.state_dict().items()}
    measured = averages.means | {"skipped": averages.skipped, "streak": averages.bad_in_a_row}
    if trainer.codebook is not None:
        measured["codes_used"], measured["perplexity"] = trainer.codebook.read_usage()
    return {k: v.clone() for k, v in state.items()}, measured


def keep(path: Path, state: dict[str, Tensor], measured: dict[str, float]) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(measured))


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    return load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())


def interrupted(run: TokenizerRun, directory: Path, parallel: SingleProcess) -> None:
    """The last process is told to end after step 3; then the same command again, for which it cannot read the newest checkpoint."""

    def report(now: Report) -> None:
        if now.step == 3 and parallel.rank == parallel.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train_tokenizer(run, directory, device=CPU, parallel=parallel, on_report=report)
    assert not (directory / "tokenizer").exists()
    assert [p.name for p in run_checkpoints(directory)] == ["step-00000004", "step-00000002"]
    with pytest.MonkeyPatch.context() as patch:
        if not parallel.first:
            checksum = checkpoints.checksum
            patch.setattr(checkpoints, "checksum", lambda path: "" if "step-00000004" in str(path) else checksum(path))
        train_tokenizer(run, directory, device=CPU, parallel=parallel, resume=True)


def diverging(run: TokenizerRun, directory: Path, parallel: SingleProcess) -> None:
    """Images of the last process are not numbers, always; the first process says what that means."""
    with pytest.MonkeyPatch.context() as patch:
        if not parallel.first:
            patch.setattr(MemoryBatches, "batch", lambda self, step: torch.full((4, 3, 8, 8), torch.nan))
        said = "2 steps in a row had a non-finite loss" if parallel.first else "process 0 of the run has failed"
        with pytest.raises(UserError, match=said):
            train_tokenizer(run, directory, device=CPU, parallel=parallel)


def pair(root: Path, data: Path) -> None:
    """What each of two processes does for all tests below: one group, because starting one is what takes the time."""
    with joined("ddp", CPU) as parallel:
        for name in CODEBOOKS:
            keep(root / f"drawn-{parallel.rank}" / name, *taken(run_of("", name), parallel))
            with without_draws():
                keep(root / f"exact-{parallel.rank}" / name, *taken(run_of("", name), parallel))
                for spoilt in SPOILT:
                    keep(root / f"{spoilt}-{parallel.rank}" / name, *taken(run_of("", name), parallel, spoilt))
        for name in ("kl", "ema-revived"):
            run = run_of(data, name, sample_images=24)
            train_tokenizer(run, root / f"whole-{name}", device=CPU, parallel=parallel)
            interrupted(run, root / f"torn-{name}", parallel)
            with without_draws():
                train_tokenizer(plain(run, data), root / f"plain-{name}", device=CPU, parallel=parallel)
        diverging(run_of(data, "kl", max_bad_steps=2), root / "diverging", parallel)


def plain(run: TokenizerRun, data: Path) -> TokenizerRun:
    """Without mirror images."""
    return replace(run, data=ImagesConfig(path=str(data), flip=False))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data", per_class=8)


@pytest.fixture(scope="module")
def root(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert group(2, pair, root, data) == [0, 0]
    return root


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("name", CODEBOOKS)
def test_two_processes_learn_what_one_does(root: Path, name: str) -> None:
    with without_draws():
        expected, measured = taken(run_of("", name), SingleProcess())
    assert measured["adaptive_weight"] > 0
    for rank in range(2):
        found, means = kept(root / f"exact-{rank}" / name)
        check_same(found, expected)
        assert means == pytest.approx(measured, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_all_processes_end_with_the_same_bits(root: Path, name: str) -> None:
    (one, measured), (other, means) = (kept(root / f"drawn-{rank}" / name) for rank in range(2))
    assert one.keys() == other.keys()
    assert [k for k, v in one.items() if not torch.equal(v, other[k])] == []
    assert means == measured
    assert all(v.isfinite().all() for v in one.values())


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_bad_part_of_one_process_is_skipped_by_all_alike(root: Path, name: str, spoilt: str) -> None:
    with without_draws():
        expected, measured = taken(run_of("", name), SingleProcess(), spoilt)
    assert (measured["skipped"], measured["streak"]) == (1, 1)
    for rank in range(2):
        found, means = kept(root / f"{spoilt}-{rank}" / name)
        check_same(found, expected)
        assert means == pytest.approx(measured, rel=1e-4, abs=1e-6)


def files(run: Path) -> list[str]:
    """All files of a run, but for what TensorBoard adds to a name."""
    return sorted(str(p.relative_to(run)).split(".tfevents")[0] for p in run.rglob("*") if p.is_file())


def lines(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds_left")} for line in found]


@pytest.mark.parametrize("name", ["kl", "ema-revived"])
def test_a_run_of_two_processes_writes_what_one_does_once(root: Path, data: Path, tmp_path: Path, name: str) -> None:
    run = plain(run_of(data, name, sample_images=24), data)
    with without_draws():
        train_tokenizer(run, tmp_path / "one", device=CPU)
    for found in (root / f"plain-{name}", root / f"whole-{name}"):
        assert files(found) == files(tmp_path / "one")
        assert [line["step"] for line in lines(found)] == [2, 4, 6]
    for found, expected in zip(lines(root / f"plain-{name}"), lines(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    pair = [root / f"plain-{name}", tmp_path / "one"]
    for file in ("tokenizer.safetensors", "codebook.safetensors")[: 1 if name == "kl" else 2]:
        check_same(*(load_file(run_checkpoints(run)[0] / file) for run in pair))
    if name == "kl":
        scale, expected = (load_tokenizer(run).config.scale for run in pair)
        assert scale == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["kl", "ema-revived"])
def test_processes_stop_together_and_resume_to_the_same_bits(root: Path, name: str) -> None:
    whole, torn = (run_checkpoints(root / f"{kind}-{name}")[0] for kind in ("whole", "torn"))
    assert whole.name == torn.name == "step-00000006"
    for path in whole.glob("*.safetensors"):
        a, b = load_file(path), load_file(torn / path.name)
        assert [k for k, v in a.items() if not torch.equal(v, b[k])] == []
    assert lines(root / f"torn-{name}") == lines(root / f"whole-{name}")


def of_world(world: int, rank: int = 0) -> SingleProcess:
    parallel = SingleProcess()
    parallel.world, parallel.rank = world, rank
    return parallel


def test_parts_are_those_of_one_batch(data: Path) -> None:
    config = ImagesConfig(path=str(data))
    for change in (config, replace(config, max_memory_gib=0.0)):
        whole = open_images(change, 8, batch_size=6, seed=3, device=CPU)
        parts = [open_images(change, 8, batch_size=6, seed=3, device=CPU, part=of_world(3, r).part(6)) for r in range(3)]
        for step in (0, 1, 2, 7):
            assert torch.equal(torch.cat([part.pixels(step) for part in parts]), whole.pixels(step))


def test_draws_are_each_processs_own_and_one_process_draws_as_ever() -> None:
    run = run_of("", "kl")
    found = []
    for parallel in (SingleProcess(), of_world(2, 0), of_world(2, 1)):
        TokenizerStep(run.tokenizer.build(), run, None, parallel).seed(5)
        found.append(torch.initial_seed())
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in (b"0/5", b"0/5/0", b"0/5/1")]
    assert found == [int.from_bytes(digest, "little") >> 1 for digest in digests]


def test_processes_that_do_not_divide_the_batch_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^3 processes for a batch of 8; allowed: a number of processes that divides it$"):
        train_tokenizer(run_of(data, "kl"), tmp_path / "run", device=CPU, parallel=of_world(3))
    assert not (tmp_path / "run").exists()


def test_graphs_are_of_one_process() -> None:
    cuda = torch.device("cuda")
    assert [pick_engine("auto", cuda, of_world(world)) for world in (1, 2)] == ["compile-graphs", "compile"]
    assert [pick_engine("auto", CPU, of_world(world)) for world in (1, 2)] == ["eager", "eager"]
    for chosen in ("graphs", "compile-graphs"):
        assert pick_engine(chosen, cuda, SingleProcess()) == chosen
        with pytest.raises(UserError, match=f"train.engine is '{chosen}', CUDA graphs, which do not hold what 2 processes send"):
            pick_engine(chosen, cuda, of_world(2))


def told(data: Path, directory: Path, output: Path, *more: str) -> int:
    quiet(output)
    TOKENIZER_RECIPES["tiny"] = lambda: replace(run_of(data, "kl"), discriminator=DiscriminatorConfig(weight=0.0))
    return main(["tokenizer", "train", "tiny", "--out", str(directory), "--device", "cpu", *more])


@pytest.mark.parametrize(("batch", "code", "said"), [("8", 0, "trained: "), ("9", 2, "continuar: error: 2 processes for a batch")])
def test_the_command_speaks_once(data: Path, tmp_path: Path, batch: str, code: int, said: str) -> None:
    port, outputs = free_port(), [tmp_path / str(rank) for rank in range(2)]
    more = ("--train.batch-size", batch)
    started = [start(told, data, tmp_path / "run", outputs[r], *more, rank=r, world=2, port=port) for r in range(2)]
    assert finish(started) == [code] * 2
    first, other = (path.read_text() for path in outputs)
    assert said in first
    assert "training" in first or code
    assert [line for line in other.splitlines() if "tensorboard" not in line.lower()] == []


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_exits_well(data: Path, tmp_path: Path, world: int) -> None:
    port, directory, ranks = free_port(), tmp_path / "run", [None] if world == 1 else [0, 1]
    more = ("--train.images", "800000", "--train.log-images", "8")
    started = [start(told, data, directory, tmp_path / f"{r}", *more, rank=r, world=world, port=port) for r in ranks]
    metrics = directory / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    # One of the processes gets the signal; all stop at the same step.
    started[-1].terminate()
    assert finish(started) == [0] * world
    step = int(run_checkpoints(directory)[0].name.removeprefix("step-"))
    output = " ".join((tmp_path / f"{ranks[0]}").read_text().split())
    assert f"stopped on request at step {step:,} of 100,000" in output
    assert "Traceback" not in output
    assert not (directory / "tokenizer").exists()
