"""The training loop.

1. Open the data and the tokenizer (`training.source`).
2. Build the model, or restore the newest intact checkpoint of the run.
3. For each step: seed, batch, step. Now and then: metrics, sample grids, a checkpoint.

Every step is a function of (seed, step), so a resumed run continues the same stream exactly.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from continuar.checkpoints.store import ModelFile, read_json, write_json
from continuar.configs import differences, from_json, to_json
from continuar.errors import UserError, require
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.tokenizers import PixelConfig, Tokenizer
from continuar.training.config import Run
from continuar.training.log import RunLog
from continuar.training.optim import learning_rate
from continuar.training.source import Stream, reads_cache, training_data
from continuar.training.state import load_newest, save_checkpoint
from continuar.training.step import TrainStep


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


def train(
    run: Run,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Pipeline:
    """Trains a run in ``directory`` and returns a pipeline with its averaged weights.

    Args:
        resume: continue the run in ``directory``; a directory without one starts from the beginning.
        force: resume although the config differs.
        on_report: called after every step.
        on_read: called with (images read, images in all) while the data is read.
        should_stop: asked after every step; when it says so the run ends there, after a checkpoint, and ``resume`` continues it.
            Where training is cut into slices is no part of what is trained, so it is no field of the config.

    Raises:
        UserError: bad data, a directory that holds another run, too many non-finite steps in a row.
        Interrupted: Ctrl-C; a checkpoint was kept.
    """
    check_directory(run, directory, resume, force)
    data = training_data(run, on_read, directory if resume else None)
    run, tokenizer = data.run, data.tokenizer
    torch.manual_seed(run.seed)
    with torch.device(device):
        model = run.model_config(len(data.classes)).build()
    trainer = TrainStep(model, run)
    first = load_newest(directory, trainer) if resume else 0
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", run)
    file = ModelFile(model.config, run.tokenizer, data.classes, run.sampling)
    tokenizer.to(device)
    stream = data.stream(tokenizer, device)
    loop = _Loop(run, directory, file, tokenizer, trainer, stream, on_report, should_stop, first)
    # What autocast leaves in float32 (time embedding, output layer) may use TF32 in training, never in sampling.
    with matmul_precision("high" if device.type == "cuda" and run.train.precision != "float32" else "highest"):
        loop.steps_from(first)
    return Pipeline(file, trainer.ema.model, tokenizer)


def check_directory(run: Run, directory: Path, resume: bool, force: bool) -> None:
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
    old, new = to_json(from_json(Run, read_json(config), str(config))), to_json(run)
    if isinstance(run.tokenizer, PixelConfig) and run.tokenizer.std == 0 and isinstance(old, dict):
        new["tokenizer"]["std"] = old.get("tokenizer", {}).get("std", 0)
    if reads_cache(run.data):
        new["tokenizer"] = old["tokenizer"]
    changed = differences(old, new)
    if changed and not force:
        raise UserError(f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same")


class _Loop:
    """The steps of one run; see the module's docstring."""

    def __init__(
        self,
        run: Run,
        directory: Path,
        file: ModelFile,
        tokenizer: Tokenizer,
        trainer: TrainStep,
        stream: Stream,
        on_report: Callable[[Report], None] | None,
        should_stop: Callable[[], bool] | None,
        first: int,
    ) -> None:
        self.run, self.directory, self.file, self.tokenizer, self.trainer = run, directory, file, tokenizer, trainer
        self.on_report, self.should_stop = on_report, should_stop or (lambda: False)
        self.stream = stream
        self.log = RunLog(directory, first)
        self._since, self._since_step = time.monotonic(), first

    def steps_from(self, first: int) -> None:
        """Runs steps ``first`` to the last; Ctrl-C or ``should_stop`` ends it after a checkpoint."""
        loop = self.run.train
        checkpoint = self.directory
        with catch_interrupt() as interrupted:
            for step in range(first, loop.steps):
                self.trainer.seed(step)
                tokens, labels = self.stream.batch(step)
                self.trainer(step, tokens, labels)
                done = step + 1
                metrics = self._write_metrics(done) if self._due(done, loop.log_images) else {}
                if loop.sample_images and self._due(done, loop.sample_images):
                    self._draw_grids(done)
                interrupt = interrupted() and done < loop.steps
                stop = interrupt or self.should_stop()
                if stop or done == loop.steps or (loop.save_images and self._due(done, loop.save_images)):
                    checkpoint = self._save(done)
                if self.on_report is not None:
                    self.on_report(Report(done, loop.steps, metrics))
                if interrupt:
                    self.log.close()
                    raise Interrupted(checkpoint)
                if stop:
                    break
        self.log.close()

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
        self.log.write(done, metrics)
        self._since, self._since_step = now, done
        return metrics

    def _draw_grids(self, done: int) -> None:
        """Sample grids of the averaged and of the raw weights: when one is bad, the other tells why."""
        began = time.monotonic()
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        classes = self.file.classes
        labels = [i % len(classes) for i in range(max(16, min(32, 2 * len(classes))))] if classes else None
        seeds = list(range(len(labels) if labels else 16))
        for name, model in (("ema", self.trainer.ema.model), ("raw", self.trainer.model)):
            with matmul_precision("highest"):
                images = Pipeline(self.file, model, self.tokenizer)(labels, seeds, batch_size=len(seeds))
            picture = grid(images, [classes[i] for i in labels] if labels else None, columns=min(8, len(seeds)))
            save_png(picture, folder / f"step-{done:08d}-{name}.png")
            self.log.picture(done, f"samples/{name}", picture)
        self.trainer.model.train()
        # Drawing is not training: keep it out of images per second.
        self._since += time.monotonic() - began

    def _save(self, done: int) -> Path:
        began = time.monotonic()
        checkpoint = save_checkpoint(self.directory, self.file, self.tokenizer, self.trainer, done, self.run.train.keep)
        self._since += time.monotonic() - began
        return checkpoint


@contextmanager
def matmul_precision(level: str) -> Iterator[None]:
    """Within the block, float32 matrix products are "highest" (float32) or "high" (TF32, on GPUs that have it)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only sets a flag, so that a step is never torn; the second interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    flag = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
