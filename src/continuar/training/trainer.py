"""Signals that end a run: noted when they come, obeyed between two steps, so that a step is never torn.

What happens when skipping single bad steps is not enough.

1. A step with a non-finite loss or gradient changes nothing (`step`). After ``max_bad_steps`` of them in a row, or when weights
   themselves are not finite, the run goes back to its newest intact checkpoint; such weights are never saved.
2. From there on all draws are others, because the same ones would lead to the same place.
3. If no checkpoint was written since the last time, it goes one checkpoint further back than then.
4. After ``max_rollbacks`` times in the life of the run, it stops.

How often a run went back is part of its checkpoints: a run that is killed and resumed takes the same way.

The steps of one run, and what happens between them: metrics, sample grids, checkpoints, and a stop.

Several processes take every step together; the first writes the files.

The training loop.

1. Open the data and the tokenizer (`training.source`).
2. Build the model, with the weights the run begins with (`training.initial`), or restore the newest intact checkpoint of the run.
3. Take the steps, and between them write metrics, sample grids and checkpoints (`Steps`).

Every step is a function of (seed, step), so a resumed run continues the same stream exactly. Several processes do all of this
together (`training.parallel`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from continuar.checkpoints.store import PipelineConfig
from continuar.config import differences, to_json
from continuar.devices import GIB
from continuar.distributed import SingleProcess, gathered_model, raise_on_all_ranks
from continuar.errors import UserError, require
from continuar.io import read_config, read_json, write_json
from continuar.models.autoregressive import Model
from continuar.models.base import TokenModel
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline, newest_checkpoints, to_uint8
from continuar.tensors import matmul_precision
from continuar.tokenizers import PixelConfig, Tokenizer
from continuar.training.checkpoint import load_newest, save_checkpoint
from continuar.training.config import BaseRun, LoopConfig, warn
from continuar.training.data import ReaderDied, Stream, reads_cache, training_data
from continuar.training.estimate import out_of_memory
from continuar.training.finetune import begin_from
from continuar.training.metrics import Online, RunLog, Tracker, TrackerName, check_tracker, open_tracker
from continuar.training.power_ema import drop_after
from continuar.training.step import Averages, TrainStep, learning_rate


class Stop(IntEnum):
    """Why a run should end now; where processes differ, the largest holds."""

    NO = 0
    ASKED = 1  # SIGTERM, or the caller: save and end well
    INTERRUPTED = 2  # Ctrl-C: save and say so


class Signals:
    """What has come so far."""

    def __init__(self) -> None:
        self.stop = Stop.NO

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C interrupts at once."""
        if number == signal.SIGINT and self.stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self.stop = max(self.stop, Stop.INTERRUPTED if number == signal.SIGINT else Stop.ASKED)


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Within the block Ctrl-C and SIGTERM are only noted; outside the main thread, which alone gets signals, none come."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_LOG = logging.getLogger("continuar")
_ADVICE = (
    "try a lower --optim.lr, a longer --optim.warmup-images, or --train.precision float32, and look at the data (a changed run is "
    "resumed with --force)"
)


class Rollback:
    """Takes a trainer back; see the module's docstring."""

    def __init__(self, directory: Path, trainer: TrainStep, loop: LoopConfig) -> None:
        self._directory, self._trainer, self._loop = directory, trainer, loop
        self._since_saved = 0

    def saved(self) -> None:
        """A checkpoint was written."""
        self._since_saved = 0

    def __call__(self, problem: str) -> int:
        """Restores a checkpoint, says so loudly and returns the steps that are done in it; all processes together.

        Args:
            problem: what is wrong, and since when.

        Raises:
            UserError: there is no checkpoint, or this happened too often.
        """
        trainer, limit = self._trainer, self._loop.max_rollbacks
        kept = newest_checkpoints(self._directory)
        require(bool(kept), f"{problem}; {_ADVICE}; there is no checkpoint yet")
        times = trainer.rollbacks + 1
        often = f"the run went back {trainer.rollbacks} times before (train.max_rollbacks is {limit})"
        require(times <= limit, f"{problem}; {often}; {_ADVICE}; the last checkpoint is {kept[0]}")
        step = load_newest(self._directory, trainer, skip=min(self._since_saved, len(kept) - 1))
        self._since_saved += 1
        trainer.rollbacks = times
        trainer.meter.reset()
        if trainer.parallel.first:
            _LOG.error("%s: back to step %d, with other draws from there (rollback %d of %d)", problem, step, times, limit)
        return step


@dataclass(frozen=True)
class Report:
    """Where a run stands: step of steps, the metrics just written (or empty)."""

    step: int
    steps: int
    metrics: dict[str, float | int]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after which a checkpoint was kept; ``checkpoint`` says where."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


class Steps:
    """See the module's docstring.

    Args:
        first: steps that are done already.
        on_report, should_stop: see `train`.
        tracker: where metrics go beside the run's directory.
        online: scores samples, in the first process; None if there are to be no scores.
    """

    def __init__(
        self,
        run: BaseRun,
        directory: Path,
        file: PipelineConfig,
        tokenizer: Tokenizer,
        trainer: TrainStep,
        stream: Stream,
        on_report: Callable[[Report], None] | None,
        should_stop: Callable[[], bool] | None,
        tracker: Tracker | None,
        online: Online | None,
        first: int,
    ) -> None:
        self.run, self.directory, self.file, self.tokenizer, self.trainer = run, directory, file, tokenizer, trainer
        self.on_report, self.should_stop = on_report, should_stop or (lambda: False)
        self.parallel, self.tracker, self.online = trainer.parallel, tracker, online
        self._scores_due = False
        self._masks_vary = len(trainer.model.num_masked_distribution()) > 1
        loop = run.train
        self.stream = stream
        self._rollback = Rollback(directory, trainer, loop)
        self._of_samples: dict[str, float] = {}
        self._begin_at(first)
        self._since = time.monotonic()

    def run_from(self, first: int) -> None:
        """Runs steps ``first`` to the last; Ctrl-C, SIGTERM or ``should_stop`` ends it after a checkpoint.

        Raises:
            Interrupted: Ctrl-C.
        """
        loop, step, stop = self.run.train, first, Stop.NO
        checkpoint = self.directory
        with noted_signals() as signals:
            while step < loop.steps and not stop:
                self._take(step)
                step = done = step + 1
                averages = self.trainer.meter.read() if self._due(done, loop.log_images) else None
                if averages is not None and averages.bad_in_a_row >= loop.max_bad_steps:
                    step = self._roll_back(f"{averages.bad_in_a_row} steps in a row had a non-finite loss or gradient")
                    continue
                if self._due(done, loop.sample_images):
                    self._draw_grids(done)
                self._score_if_due(done)
                metrics = self._write_metrics(done, averages) if averages is not None else {}
                if self._due(done, self.run.ema.snapshot_images):
                    self._write_averages(done)
                stop = self._stop(signals)
                if stop or self._due(done, loop.save_images) or loop.due(done, loop.milestone_images) or done == loop.steps:
                    if not self.trainer.finite():
                        step, stop = self._roll_back(f"after step {done} weights are not finite numbers"), Stop.NO
                        continue
                    checkpoint = self._save(done)
                if self.on_report is not None:
                    self.on_report(Report(done, loop.steps, metrics))
        if self.log is not None:
            self.log.close()
        if stop is Stop.INTERRUPTED and step < loop.steps:
            raise Interrupted(checkpoint)

    def _take(self, step: int) -> None:
        try:
            self.trainer(step, self._batch)
        except torch.OutOfMemoryError as problem:
            kind, device = "fsdp" if self.parallel.sharded else "ddp", self.trainer.device
            gib = torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None
            raise out_of_memory(self.run, len(self.file.classes), self.parallel.world, kind, gib) from problem

    def _batch(self, step: int, slot: int) -> tuple[Tensor, Tensor]:
        try:
            return self.stream.batch(step, slot)
        except ReaderDied as problem:
            raise UserError(f"the data of step {step + 1} could not be read ({problem}); {self._kept()}") from problem

    def _kept(self) -> str:
        kept = newest_checkpoints(self.directory)
        return f"{kept[0]} is intact, and --resume continues from it" if kept else "there is no checkpoint before it"

    def _stop(self, signals: Signals) -> Stop:
        """What all processes agree on."""
        return Stop(self.parallel.most(max(signals.stop, Stop.ASKED if self.should_stop() else Stop.NO)))

    def _due(self, done: int, every_images: int) -> bool:
        """Whether step ``done`` is the first to reach another multiple of ``every_images``, or the last step; never for 0."""
        loop = self.run.train
        return every_images > 0 and (done == loop.steps or loop.due(done, every_images))

    def _roll_back(self, problem: str) -> int:
        """Where to go on."""
        with self._untimed():
            step = self._rollback(problem)
            if self.log is not None:
                self.log.close()
            self._begin_at(step)
        return step

    def _begin_at(self, step: int) -> None:
        """Forgets what was written after ``step``."""
        self._since_step = step
        self.log = RunLog(self.directory, step, self.tracker) if self.parallel.first else None
        if self.parallel.first:
            drop_after(self.directory, step)

    def _write_metrics(self, done: int, averages: Averages) -> dict[str, float | int]:
        now, batch = time.monotonic(), self.run.train.batch_size
        speed = (done - self._since_step) * batch / max(now - self._since, 1e-9)
        metrics: dict[str, float | int] = {
            "images": done * batch,
            "loss": averages.loss,
            "gradient_norm": averages.gradient_norm,
            **({"token_std": averages.token_std} if self.file.model.tokens.kind == "vector" else {}),
            "lr": learning_rate(self.run.optim, (done - 1) * batch, self.run.train.steps * batch),
            "skipped_steps": averages.skipped,
            "images_per_second": speed,
            "seconds_left": (self.run.train.steps - done) * batch / speed,
            **{f"loss_by_time/{part}": loss for part, loss in averages.loss_by_time.items()},
            **{f"loss_by_masked/{share}": loss for share, loss in averages.loss_by_masked.items() if self._masks_vary},
            **self._of_samples,
        }
        self._of_samples = {}
        if self.log is not None:
            self.log.write(done, metrics)
        self._since, self._since_step = now, done
        return metrics

    def _draw_grids(self, done: int) -> None:
        """Sample grids of the averaged and of the raw weights: when one is bad, the other tells why."""
        with self._untimed():
            for name, model in (("ema", self.trainer.ema.model), ("raw", self.trainer.model)):
                whole = gathered_model(model, self.parallel)
                if whole is not None:
                    self._draw_grid(done, name, whole)
            self.trainer.model.train()

    def _score_if_due(self, done: int) -> None:
        """Scores samples of the averaged and of the raw weights, where that is due and the time for it is there."""
        self._scores_due |= self._due(done, self.run.online.every_images)
        if not self._scores_due or not self.parallel.any(self.online is not None and self.online.affordable()):
            return
        self._scores_due = False
        with self._untimed():
            models = {"ema": self.trainer.ema.model, "raw": self.trainer.model}
            wholes = {name: gathered_model(model, self.parallel) for name, model in models.items()}
            if self.online is not None:
                pipes = {name: Pipeline(self.file, whole, self.tokenizer) for name, whole in wholes.items() if whole is not None}
                self._of_samples |= {**self.online.score(pipes), "online/images": done * self.run.train.batch_size}
            self.trainer.model.train()

    def _draw_grid(self, done: int, name: str, model: TokenModel) -> None:
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        classes = self.file.classes
        labels = [i % len(classes) for i in range(max(16, min(32, 2 * len(classes))))] if classes else None
        seeds = list(range(len(labels) if labels else 16))
        pipe = Pipeline(self.file, model, self.tokenizer)
        with matmul_precision("highest"):
            # Not the engine whose graphs would keep their memory while training goes on.
            tokens = pipe.tokens(labels, seeds, batch_size=len(seeds), engine="eager")
        images = to_uint8(pipe.tokenizer.decode(tokens)).cpu().numpy()
        picture = grid(images, [classes[i] for i in labels] if labels else None, columns=min(8, len(seeds)))
        save_png(picture, folder / f"step-{done:08d}-{name}.png")
        if self.log is not None:
            self.log.picture(done, f"samples/{name}", picture)
        if self.file.model.tokens.kind == "vector":
            self._of_samples[f"sample_max/{name}"] = float(tokens.abs().max())

    def _write_averages(self, done: int) -> None:
        with self._untimed(), self._written(f"the averages of step {done}"):
            self.trainer.averages.write(self.directory, done, self.parallel)

    def _save(self, done: int) -> Path:
        with self._untimed(), self._written(f"the checkpoint of step {done}"):
            checkpoint = save_checkpoint(self.directory, self.file, self.tokenizer, self.trainer, done)
        self._rollback.saved()
        return checkpoint

    @contextmanager
    def _written(self, what: str) -> Iterator[None]:
        """Says what is still intact when something cannot be written."""
        try:
            yield
        except OSError as problem:
            raise UserError(f"{what} could not be written ({problem}); {self._kept()}") from problem

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """What is not training is kept out of images per second."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began


__all__ = ["Interrupted", "Report", "train"]


def train(
    run: BaseRun,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    parallel: SingleProcess | None = None,
    track: TrackerName | None = None,
) -> Pipeline:
    """Trains a run in ``directory`` and returns a pipeline with its averaged weights.

    Args:
        resume: continue the run in ``directory``; a directory without one starts from the beginning.
        force: resume although the config differs.
        on_report: called after every step.
        on_read: called with (images read, images in all) while the data is read.
        should_stop: asked after every step; when it says so the run ends there, after a checkpoint, and ``resume`` continues it.
            Where training is cut into slices is no part of what is trained, so it is no field of the config.
        parallel: the processes that train together (`joined`); one if not given.
        track: send metrics there, too; "wandb" or "trackio".

    Raises:
        UserError: bad data, a directory that holds another run, too many non-finite steps in a row.
        Interrupted: Ctrl-C; a checkpoint was kept.
    """
    parallel = parallel or SingleProcess()
    with raise_on_all_ranks(parallel):
        check_tracker(track)
        check_directory(run, directory, resume, force)
        run = shared_out(run, directory, parallel)
        data = training_data(run, on_read, directory if resume else None)
    run, tokenizer = data.run, data.tokenizer
    if parallel.first:
        warn(run)
    if not reads_cache(run.data):
        parallel.share(list(tokenizer.state_dict().values()))  # fitted, which hardware may round otherwise
    torch.manual_seed(run.seed)
    with torch.device(device):
        model = run.model_config(len(data.classes)).build()
    with raise_on_all_ranks(parallel):
        if run.init and not (resume and newest_checkpoints(directory)):
            assert isinstance(model, Model)  # a DiT's run refuses it
            begin_from(model, run.init, tokenizer)
    trainer = TrainStep(model, run, parallel)
    first = load_newest(directory, trainer) if resume else 0
    file = PipelineConfig(model.config, run.tokenizer, data.classes, run.sampling)
    with raise_on_all_ranks(parallel):
        online = Online(run, file, tokenizer, directory, device) if run.online.every_images and parallel.first else None
    begin_directory(directory, run, parallel)
    tracker = open_tracker(track, directory, run) if track and parallel.first else None
    stream = data.stream(tokenizer.to(device), device, trainer.slots)
    steps = Steps(run, directory, file, tokenizer, trainer, stream, on_report, should_stop, tracker, online, first)
    # What autocast leaves in float32 (time embedding, output layer) may use TF32 in training, never in sampling.
    with matmul_precision("high" if device.type == "cuda" and run.train.precision != "float32" else "highest"):
        try:
            steps.run_from(first)
        finally:
            if tracker is not None:
                tracker.finish()
    return Pipeline.from_pretrained(directory, device=device) if parallel.sharded else Pipeline(file, trainer.ema.model, tokenizer)


def shared_out(run: BaseRun, directory: Path, parallel: SingleProcess) -> BaseRun:
    """The run with its micro-batch decided: as given, as the run in ``directory`` has it, or what one process has of a batch.

    Raises:
        UserError: the processes cannot share the batch evenly.
    """
    loop, config = run.train, directory / "config.json"
    size = loop.micro_batch or (read_json(config)["train"].get("micro_batch") if config.exists() else 0)
    if not size:
        size = len(parallel.part(loop.batch_size))
    run = replace(run, train=replace(loop, micro_batch=size))
    parallel.slots(run.train.micro_batches)
    return run


def check_directory(run: BaseRun, directory: Path, resume: bool, force: bool) -> None:
    """Refuses to mix runs: another run's directory, or a resumed run whose config changed."""
    standing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    require(standing.is_dir(), f"{standing} is a file; allowed: a directory for the run")
    require(os.access(standing, os.W_OK), f"{standing} cannot be written to; choose another --out")
    config = directory / "config.json"
    if not config.exists():
        return
    if not resume:
        raise UserError(f"{directory} already holds a run; --resume continues it, or choose another --out")
    # Fields that are newer than the run are as they were before they could be given.
    old, new = to_json(read_config(type(run), config)), to_json(run)
    if isinstance(run.tokenizer, PixelConfig) and run.tokenizer.std == 0 and isinstance(old, dict):
        new["tokenizer"]["std"] = old.get("tokenizer", {}).get("std", 0)
    if reads_cache(run.data):
        new["tokenizer"] = old["tokenizer"]
    if run.train.micro_batch == 0:
        new["train"]["micro_batch"] = old["train"]["micro_batch"]
    changed = differences(old, new)
    if changed and not force:
        raise UserError(f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same")


def begin_directory(directory: Path, run: object, parallel: SingleProcess) -> None:
    """Makes the run directory with its ``config.json``.

    Raises:
        UserError: it cannot be written, or is not one directory for all processes.
    """
    with raise_on_all_ranks(parallel):
        if parallel.first:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "config.json", run)
    with raise_on_all_ranks(parallel):
        found = (directory / "config.json").is_file()
        require(found, f"{directory} is not the same directory for all processes; allowed: one on a file system they share")
