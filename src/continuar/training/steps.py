"""The steps of one run, and what happens between them: metrics, sample grids, checkpoints, and a stop.

Several processes take every step together; the first writes the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from continuar.checkpoints.store import ModelFile
from continuar.devices import GIB
from continuar.errors import UserError
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline, newest_checkpoints, to_uint8
from continuar.precision import matmul_precision
from continuar.token_model import TokenModel
from continuar.tokenizers import Tokenizer
from continuar.training.config import BaseRun
from continuar.training.latents import ReaderDied
from continuar.training.log import RunLog
from continuar.training.meter import Averages
from continuar.training.online import Online
from continuar.training.optim import learning_rate
from continuar.training.parallel import whole_model
from continuar.training.plan import out_of_memory
from continuar.training.power_ema import drop_after
from continuar.training.rollback import Rollback
from continuar.training.signals import Signals, Stop, noted_signals
from continuar.training.source import Stream
from continuar.training.state import save_checkpoint
from continuar.training.step import TrainStep
from continuar.training.trackers import Tracker


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
        file: ModelFile,
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
        self._masks_vary = len(trainer.model.queried_counts()) > 1
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
                whole = whole_model(model, self.parallel)
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
            wholes = {name: whole_model(model, self.parallel) for name, model in models.items()}
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
