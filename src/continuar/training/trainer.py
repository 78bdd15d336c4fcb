"""The training loop of models and of tokenizers.

1. `train` (here) and `train_tokenizer` (`training.autoencoder`) open the data, build the networks or restore the newest intact
   checkpoint, and hand an `Objective` to the loop.
2. `Trainer` takes the steps. Between them it writes metrics, pictures and checkpoints.
3. Ctrl-C and SIGTERM are noted when they come and obeyed between two steps, after a checkpoint.
4. A step with a non-finite loss or gradient changes nothing. After ``max_bad_steps`` of them in a row, or when weights themselves
   are not finite, the run goes back to its newest intact checkpoint, or to the one before if none was written since it last went
   back. From there on all draws are others, because the same ones would lead to the same place. After ``max_rollbacks`` times it
   stops.

Every step is a function of (seed, step, rollbacks), and checkpoints hold the number of rollbacks, so a resumed run continues the
same stream exactly. Several processes take every step together; the first writes the files.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image

from continuar.checkpoints.store import PipelineConfig
from continuar.config import differences, to_json
from continuar.distributed import GIB, SingleProcess, gathered_model, raise_on_all_ranks
from continuar.errors import UserError, require
from continuar.io import read_config, read_json, write_json
from continuar.models.autoregressive import Model
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline, to_uint8
from continuar.tensors import matmul_precision
from continuar.tokenizers import PixelConfig, Tokenizer
from continuar.training.checkpoint import load_newest, run_checkpoints, save_checkpoint
from continuar.training.config import BaseRun, TokenizerRun, warn
from continuar.training.data import ReaderDied, Stream, reads_cache, training_data
from continuar.training.estimate import out_of_memory
from continuar.training.finetune import begin_from
from continuar.training.metrics import Online, RunLog, Tracker, TrackerName, check_tracker, open_tracker
from continuar.training.power_ema import drop_after
from continuar.training.step import Averages, TrainStep

__all__ = ["Interrupted", "Report", "train"]
_LOG = logging.getLogger("continuar")
_ADVICE = (
    "try a lower --optim.lr, a longer --optim.warmup-images, or --train.precision float32, and look at the data (a changed run is "
    "resumed with --force)"
)


class Stop(IntEnum):
    """Why a run should end now; where processes differ, the largest holds."""

    NO = 0
    ASKED = 1  # SIGTERM, or the caller: save and end well
    INTERRUPTED = 2  # Ctrl-C: save and say so


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after which a checkpoint was kept; ``checkpoint`` says where."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Report:
    """Progress of a run: step of steps, the metrics just written (or empty)."""

    step: int
    steps: int
    metrics: dict[str, float | int]


class Signals:
    """Ctrl-C and SIGTERM that have come so far."""

    stop = Stop.NO

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C interrupts without waiting for the step."""
        if number == signal.SIGINT and self.stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self.stop = max(self.stop, Stop.INTERRUPTED if number == signal.SIGINT else Stop.ASKED)


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Within the block Ctrl-C and SIGTERM are only noted."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
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


class Objective(ABC):
    """One kind of training: a step, its metrics, pictures and checkpoints. All processes call all methods together.

    Attributes:
        trainer: takes the steps; has ``parallel``, ``meter``, ``rollbacks``, ``rate`` and ``finite``.
    """

    trainer: Any

    @abstractmethod
    def step(self, step: int) -> None:
        """Takes step ``step`` on its batch."""

    @abstractmethod
    def metrics(self, averages: Averages) -> dict[str, float]:
        """The metrics of the steps since the last ones."""

    @abstractmethod
    def pictures(self, done: int) -> Mapping[str, Image.Image]:
        """Pictures by name after ``done`` steps, in the first process; nothing in the others."""

    @abstractmethod
    def save(self, done: int) -> Path:
        """Writes a checkpoint of ``done`` steps; OSError in every process if one cannot write."""

    @abstractmethod
    def load(self, skip: int = 0) -> int:
        """Restores the newest intact checkpoint but ``skip``; the steps that are done in it, 0 if there is none."""

    def between_steps(self, done: int) -> None:  # noqa: B027 (optional)
        """Does what else is due after ``done`` steps."""

    def forget_after(self, step: int) -> None:  # noqa: B027 (optional)
        """Removes files of steps after ``step``, which will be taken again; in the first process."""


class Trainer:
    """Takes the steps of a run in ``directory``, and writes what comes between them.

    Args:
        on_report: called after every step.
        should_stop: asked after every step whether to end there.
        tracker: gets the metrics, beside the run's directory.
    """

    def __init__(
        self,
        objective: Objective,
        run: BaseRun | TokenizerRun,
        directory: Path,
        on_report: Callable[[Report], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.objective, self.run, self.directory = objective, run, directory
        self.on_report, self.should_stop, self.tracker = on_report, should_stop or (lambda: False), tracker
        self.parallel: SingleProcess = objective.trainer.parallel
        self._rollbacks_since_saved = 0

    def run_from(self, first: int) -> bool:
        """Takes steps ``first`` to the last, and says whether it came to the last. A signal or ``should_stop`` ends it earlier,
        after a checkpoint.

        Raises:
            Interrupted: Ctrl-C.
        """
        loop, step, stop, checkpoint = self.run.train, first, Stop.NO, self.directory
        self._since = time.monotonic()
        self._begin_at(first)
        with noted_signals() as signals:
            while step < loop.steps and not stop:
                self.objective.step(step)
                step = done = step + 1
                averages = self.objective.trainer.meter.read() if self._due(done, loop.log_images) else None
                if averages is not None and averages.bad_in_a_row >= loop.max_bad_steps:
                    step = self._roll_back(f"{averages.bad_in_a_row} steps in a row had a non-finite loss or gradient")
                    continue
                with self._untimed():
                    if self._due(done, loop.sample_images):
                        self._draw(done)
                        # Only the first process draws. Without waiting here the others would time out in the next collective.
                        self.parallel.wait()
                    self.objective.between_steps(done)
                metrics = self._write_metrics(done, averages) if averages is not None else {}
                asked = max(signals.stop, Stop.ASKED if self.should_stop() else Stop.NO)
                stop = Stop(self.parallel.most(asked))
                if stop or self._due(done, loop.save_images) or loop.due(done, loop.milestone_images) or done == loop.steps:
                    # Weights that are not finite are never saved.
                    if not self.objective.trainer.finite():
                        step, stop = self._roll_back(f"after step {done} weights are not finite numbers"), Stop.NO
                        continue
                    checkpoint = self._save(done)
                if self.on_report is not None:
                    self.on_report(Report(done, loop.steps, metrics))
        if self.log is not None:
            self.log.close()
        if stop is Stop.INTERRUPTED and step < loop.steps:
            raise Interrupted(checkpoint)
        return step == loop.steps

    def _due(self, done: int, every_images: int) -> bool:
        """True at the first step that reaches another multiple of ``every_images``, and at the last step; never for 0."""
        loop = self.run.train
        return every_images > 0 and (done == loop.steps or loop.due(done, every_images))

    def _begin_at(self, step: int) -> None:
        self._since_step = step
        self.log = RunLog(self.directory, step, self.tracker) if self.parallel.first else None
        if self.parallel.first:
            self.objective.forget_after(step)

    def _write_metrics(self, done: int, averages: Averages) -> dict[str, float | int]:
        now, batch = time.monotonic(), self.run.train.batch_size
        speed = (done - self._since_step) * batch / max(now - self._since, 1e-9)
        metrics: dict[str, float | int] = {
            "images": done * batch,
            **self.objective.metrics(averages),
            "lr": self.objective.trainer.rate(done - 1),
            "skipped_steps": averages.skipped,
            "images_per_second": speed,
            "seconds_left": (self.run.train.steps - done) * batch / speed,
        }
        if self.log is not None:
            self.log.write(done, metrics)
        self._since, self._since_step = now, done
        return metrics

    def _draw(self, done: int) -> None:
        for name, picture in self.objective.pictures(done).items():
            folder = self.directory / "samples"
            folder.mkdir(exist_ok=True)
            save_png(picture, folder / f"step-{done:08d}-{name}.png")
            if self.log is not None:
                self.log.picture(done, f"samples/{name}", picture)

    def _save(self, done: int) -> Path:
        with self._untimed(), writing(f"the checkpoint of step {done}", self.directory):
            checkpoint = self.objective.save(done)
        self._rollbacks_since_saved = 0
        return checkpoint

    def _roll_back(self, problem: str) -> int:
        """Restores a checkpoint and returns the steps that are done in it.

        Raises:
            UserError: there is no checkpoint, or this happened too often.
        """
        trainer, limit, kept = self.objective.trainer, self.run.train.max_rollbacks, run_checkpoints(self.directory)
        times = trainer.rollbacks + 1
        with raise_on_all_ranks(self.parallel):
            require(bool(kept), f"{problem}; {_ADVICE}; there is no checkpoint yet")
            often = f"the run went back {trainer.rollbacks} times before (train.max_rollbacks is {limit})"
            require(times <= limit, f"{problem}; {often}; {_ADVICE}; the last checkpoint is {kept[0]}")
        with self._untimed():
            step = self.objective.load(skip=min(self._rollbacks_since_saved, len(kept) - 1))
            self._rollbacks_since_saved += 1
            trainer.rollbacks = times  # loading has set it to that of the checkpoint
            trainer.meter.reset()
            if self.parallel.first:
                _LOG.error("%s: back to step %d, with other draws from there (rollback %d of %d)", problem, step, times, limit)
            if self.log is not None:
                self.log.close()
            self._begin_at(step)
        return step

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Leaves the time of the block out of images per second."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began


class ModelObjective(Objective):
    """A model of tokens with its averages.

    Args:
        file, tokenizer: of pipelines that sample while the run goes on.
        stream: the batches.
        online: scores samples, in the first process; None if there are to be no scores.
    """

    def __init__(
        self, trainer: TrainStep, directory: Path, file: PipelineConfig, tokenizer: Tokenizer, stream: Stream, online: Online | None
    ) -> None:
        self.trainer, self.directory, self.file, self.tokenizer = trainer, directory, file, tokenizer
        self.run, self.parallel, self.stream, self.online = trainer.run, trainer.parallel, stream, online
        self._masks_vary = len(trainer.model.num_masked_distribution()) > 1
        self._scores_due = False
        self._of_samples: dict[str, float] = {}

    def step(self, step: int) -> None:
        device = self.trainer.device
        try:
            self.trainer(step, self.stream.batch)
        except ReaderDied as problem:
            kept = intact(self.directory)
            raise UserError(f"the data of step {step + 1} could not be read ({problem}); {kept}") from problem
        except torch.OutOfMemoryError as problem:
            gib = torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None
            kind = "fsdp" if self.parallel.sharded else "ddp"
            raise out_of_memory(self.run, len(self.file.classes), self.parallel.world, kind, gib) from problem

    def metrics(self, averages: Averages) -> dict[str, float]:
        hidden = () if self.file.model.tokens.kind == "vector" else ("token_std",)
        hidden_parts = () if self._masks_vary else ("loss_by_masked/",)
        found = {k: v for k, v in averages.means.items() if k not in hidden and not k.startswith(hidden_parts)}
        found |= self._of_samples
        self._of_samples = {}
        return found

    def pictures(self, done: int) -> dict[str, Image.Image]:
        """Samples of the averaged and of the raw weights: when one is bad, the other tells why."""
        # One model after the other, because a sharded one is gathered into a copy.
        pictures = {}
        for name, model in (("ema", self.trainer.ema.model), ("raw", self.trainer.model)):
            full = gathered_model(model, self.parallel)
            if full is not None:
                pictures[name] = self._sample_grid(name, Pipeline(self.file, full, self.tokenizer))
        self.trainer.model.train()
        return pictures

    def _sample_grid(self, name: str, pipe: Pipeline) -> Image.Image:
        classes = self.file.classes
        labels = [i % len(classes) for i in range(max(16, min(32, 2 * len(classes))))] if classes else None
        count = len(labels) if labels else 16
        with matmul_precision("highest"):
            # The fast engine's graphs would keep their memory while training goes on.
            tokens = pipe.tokens(labels, list(range(count)), batch_size=count, engine="eager")
        if self.file.model.tokens.kind == "vector":
            self._of_samples[f"sample_max/{name}"] = float(tokens.abs().max())
        images = to_uint8(pipe.tokenizer.decode(tokens)).cpu().numpy()
        return grid(images, [classes[i] for i in labels] if labels else None, columns=min(8, count))

    def between_steps(self, done: int) -> None:
        """Scores samples where that is due and the time for it is there, and writes power-function averages."""
        loop = self.run.train
        last = done == loop.steps
        if self.run.ema.snapshot_images and (last or loop.due(done, self.run.ema.snapshot_images)):
            with writing(f"the averages of step {done}", self.directory):
                self.trainer.averages.write(self.directory, done, self.parallel)
            self.parallel.wait()
        if not self.run.online.every_images:
            return
        self._scores_due |= last or loop.due(done, self.run.online.every_images)
        if self._scores_due and self.parallel.any(self.online is not None and self.online.affordable()):
            self._scores_due = False
            models = {"ema": self.trainer.ema.model, "raw": self.trainer.model}
            full = {name: gathered_model(model, self.parallel) for name, model in models.items()}
            if self.online is not None:
                pipes = {name: Pipeline(self.file, model, self.tokenizer) for name, model in full.items() if model is not None}
                self._of_samples |= {**self.online.score(pipes), "online/images": done * loop.batch_size}
            self.trainer.model.train()
            self.parallel.wait()

    def save(self, done: int) -> Path:
        return save_checkpoint(self.directory, self.file, self.tokenizer, self.trainer, done)

    def load(self, skip: int = 0) -> int:
        return load_newest(self.directory, self.trainer, skip)

    def forget_after(self, step: int) -> None:
        drop_after(self.directory, step)


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
        should_stop: asked after every step; if true, the run ends there, after a checkpoint, and ``resume`` continues it. It is no
            field of the config, because where training is cut into slices changes nothing of the result.
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
        run = with_micro_batch(run, directory, parallel)
        data = training_data(run, on_read, directory if resume else None)
    run, tokenizer = data.run, data.tokenizer
    if parallel.first:
        warn(run)
    if not reads_cache(run.data):
        parallel.share(list(tokenizer.state_dict().values()))  # a fitted state may be rounded otherwise on other hardware
    torch.manual_seed(run.seed)
    with torch.device(device):
        model = run.model_config(len(data.classes)).build()
    with raise_on_all_ranks(parallel):
        if run.init and not (resume and run_checkpoints(directory)):
            assert isinstance(model, Model)  # a DiT's run refuses ``init``
            begin_from(model, run.init, tokenizer)
    trainer = TrainStep(model, run, parallel)
    first = load_newest(directory, trainer) if resume else 0
    file = PipelineConfig(model.config, run.tokenizer, data.classes, run.sampling)
    with raise_on_all_ranks(parallel):
        online = Online(run, file, tokenizer, directory, device) if run.online.every_images and parallel.first else None
    begin_directory(directory, run, parallel)
    tracker = open_tracker(track, directory, run) if track and parallel.first else None
    stream = data.stream(tokenizer.to(device), device, trainer.slots)
    objective = ModelObjective(trainer, directory, file, tokenizer, stream, online)
    # What autocast leaves in float32 (time embedding, output layer) may use TF32 in training, never in sampling.
    with matmul_precision("high" if device.type == "cuda" and run.train.precision != "float32" else "highest"):
        try:
            Trainer(objective, run, directory, on_report, should_stop, tracker).run_from(first)
        finally:
            if tracker is not None:
                tracker.finish()
    return Pipeline.from_pretrained(directory, device=device) if parallel.sharded else Pipeline(file, trainer.ema.model, tokenizer)


def with_micro_batch(run: BaseRun, directory: Path, parallel: SingleProcess) -> BaseRun:
    """The run with its micro-batch decided: as given, as in ``directory``, or one process's part of a batch.

    Raises:
        UserError: the processes cannot share the batch evenly.
    """
    loop, config = run.train, directory / "config.json"
    size = loop.micro_batch or (read_json(config)["train"].get("micro_batch") if config.exists() else 0)
    run = replace(run, train=replace(loop, micro_batch=size or len(parallel.part(loop.batch_size))))
    parallel.slots(run.train.micro_batches)  # refuses what cannot be shared
    return run


def check_directory(run: BaseRun | TokenizerRun, directory: Path, resume: bool, force: bool) -> None:
    """Refuses a directory that cannot be written or holds another run, and a resumed run whose config changed."""
    standing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    require(standing.is_dir(), f"{standing} is a file; allowed: a directory for the run")
    require(os.access(standing, os.W_OK), f"{standing} cannot be written to; choose another --out")
    config = directory / "config.json"
    if not config.exists():
        return
    require(resume, f"{directory} already holds a run; --resume continues it, or choose another --out")
    # Reading the old config fills in fields that are newer than the run.
    old: Any = to_json(read_config(type(run), config))
    new: Any = to_json(run)
    if isinstance(run, BaseRun):
        # A run decides these when it begins.
        if isinstance(run.tokenizer, PixelConfig) and run.tokenizer.std == 0:
            new["tokenizer"]["std"] = old["tokenizer"].get("std", 0)
        if reads_cache(run.data):
            new["tokenizer"] = old["tokenizer"]
        if run.train.micro_batch == 0:
            new["train"]["micro_batch"] = old["train"]["micro_batch"]
    changed = differences(old, new)
    require(
        not changed or force, f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same"
    )


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


def intact(directory: Path) -> str:
    """The checkpoint a run can go on from, as the end of an error message."""
    kept = run_checkpoints(directory)
    return f"{kept[0]} is intact, and --resume continues from it" if kept else "there is no checkpoint before it"


@contextmanager
def writing(what: str, directory: Path) -> Iterator[None]:
    """Turns an error of writing files into one that says what is still intact."""
    try:
        yield
    except OSError as problem:
        raise UserError(f"{what} could not be written ({problem}); {intact(directory)}") from problem
