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

from continuar.checkpoints.store import ModelFile
from continuar.data.images import ImageSet
from continuar.errors import UserError
from continuar.model import Model
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.tokenizers import Tokenizer
from continuar.training.config import Run
from continuar.training.log import RunLog
from continuar.training.optim import learning_rate
from continuar.training.parallel import whole_model
from continuar.training.signals import Signals, Stop, noted_signals
from continuar.training.state import save_checkpoint
from continuar.training.step import TrainStep
from continuar.training.stream import ImageStream


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
    """

    def __init__(
        self,
        run: Run,
        directory: Path,
        file: ModelFile,
        tokenizer: Tokenizer,
        trainer: TrainStep,
        images: ImageSet,
        on_report: Callable[[Report], None] | None,
        should_stop: Callable[[], bool] | None,
        first: int,
    ) -> None:
        self.run, self.directory, self.file, self.tokenizer, self.trainer = run, directory, file, tokenizer, trainer
        self.on_report, self.should_stop = on_report, should_stop or (lambda: False)
        self.parallel = trainer.parallel
        loop = run.train
        self.stream = ImageStream(images, tokenizer, run.data, loop.batch_size, run.seed, trainer.device, loop.micro_batch)
        self.log = RunLog(directory, first) if self.parallel.first else None
        self._since, self._since_step = time.monotonic(), first

    def run_from(self, first: int) -> None:
        """Runs steps ``first`` to the last; Ctrl-C, SIGTERM or ``should_stop`` ends it after a checkpoint.

        Raises:
            Interrupted: Ctrl-C.
        """
        loop = self.run.train
        checkpoint = self.directory
        with noted_signals() as signals:
            for step in range(first, loop.steps):
                self.trainer(step, self.stream.batch)
                done = step + 1
                metrics = self._write_metrics(done) if self._due(done, loop.log_images) else {}
                if loop.sample_images and self._due(done, loop.sample_images):
                    self._draw_grids(done)
                stop = self._stop(signals) if done < loop.steps else Stop.NO
                if stop or done == loop.steps or (loop.save_images and self._due(done, loop.save_images)):
                    checkpoint = self._save(done)
                if self.on_report is not None:
                    self.on_report(Report(done, loop.steps, metrics))
                if stop:
                    break
            else:
                stop = Stop.NO
        if self.log is not None:
            self.log.close()
        if stop is Stop.INTERRUPTED:
            raise Interrupted(checkpoint)

    def _stop(self, signals: Signals) -> Stop:
        """What all processes agree on."""
        return Stop(self.parallel.most(max(signals.stop, Stop.ASKED if self.should_stop() else Stop.NO)))

    def _due(self, done: int, every_images: int) -> bool:
        """Whether step ``done`` is the first to reach another multiple of ``every_images``, or the last step."""
        batch = self.run.train.batch_size
        return done == self.run.train.steps or done * batch // every_images > (done - 1) * batch // every_images

    def _write_metrics(self, done: int) -> dict[str, float | int]:
        averages = self.trainer.meter.read()
        limit = self.run.train.max_bad_steps
        if averages.bad_in_a_row >= limit:
            kept = newest_checkpoints(self.directory)
            raise UserError(
                f"{averages.bad_in_a_row} steps in a row had a non-finite loss or gradient (train.max_bad_steps is {limit}); try a "
                "lower --optim.lr, a longer --optim.warmup-images, or --train.precision float32, and look at the data; "
                + (f"the last checkpoint is {kept[0]}" if kept else "there is no checkpoint yet")
            )
        now, batch = time.monotonic(), self.run.train.batch_size
        elapsed = max(now - self._since, 1e-9)
        metrics: dict[str, float | int] = {
            "images": done * batch,
            "loss": averages.loss,
            "gradient_norm": averages.gradient_norm,
            **({"token_std": averages.token_std} if self.file.model.tokens.kind == "vector" else {}),
            "lr": learning_rate(self.run.optim, (done - 1) * batch, self.run.train.steps * batch),
            "skipped_steps": averages.skipped,
            "images_per_second": (done - self._since_step) * batch / elapsed,
        }
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

    def _draw_grid(self, done: int, name: str, model: Model) -> None:
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        classes = self.file.classes
        labels = [i % len(classes) for i in range(max(16, min(32, 2 * len(classes))))] if classes else None
        seeds = list(range(len(labels) if labels else 16))
        with matmul_precision("highest"):
            images = Pipeline(self.file, model, self.tokenizer)(labels, seeds, batch_size=len(seeds))
        picture = grid(images, [classes[i] for i in labels] if labels else None, columns=min(8, len(seeds)))
        save_png(picture, folder / f"step-{done:08d}-{name}.png")
        if self.log is not None:
            self.log.picture(done, f"samples/{name}", picture)

    def _save(self, done: int) -> Path:
        loop = self.run.train
        with self._untimed():
            return save_checkpoint(
                self.directory, self.file, self.tokenizer, self.trainer, done, loop.keep, last=done == loop.steps
            )

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """What is not training is kept out of images per second."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Within the block, float32 matrix products are "highest" (float32) or "high" (TF32, on GPUs that have it)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
