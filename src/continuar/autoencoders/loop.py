"""The training loop of a tokenizer.

1. Open the images; build the networks, or restore the newest intact checkpoint of the run.
2. For each step: seed, batch, step. Now and then: metrics, reconstructions, a checkpoint.
3. At the end: measure the latents of a KL tokenizer, and keep the tokenizer with its scale in ``tokenizer/``.

Every step is a function of (seed, step) and of the number of processes, so a resumed run continues the same stream exactly. Several
processes do all of this together (`training.parallel`), each with its part of every batch; the first writes the files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from continuar.autoencoders.config import TokenizerLoopConfig, TokenizerRun
from continuar.autoencoders.images import ImageBatches, open_images
from continuar.autoencoders.perceptual import build_perceptual
from continuar.autoencoders.state import load_newest, newest_checkpoints, save_checkpoint
from continuar.autoencoders.step import TokenizerStep
from continuar.caching.statistics import LatentSums
from continuar.checkpoints.store import read_json
from continuar.checkpoints.tokenizers import save_tokenizer
from continuar.configs import differences, to_json
from continuar.errors import UserError, require
from continuar.pictures import grid, save_png
from continuar.pipeline import to_uint8
from continuar.tokenizers import VAETokenizer, VQTokenizer
from continuar.training.log import RunLog
from continuar.training.loop import begin_directory
from continuar.training.optim import learning_rate
from continuar.training.parallel import Single, together
from continuar.training.signals import Signals, Stop, noted_signals
from continuar.training.steps import Interrupted, Report

_SHOWN = 16
"""Images in a picture of reconstructions."""


def train_tokenizer(
    run: TokenizerRun,
    directory: Path,
    *,
    device: torch.device,
    resume: bool = False,
    force: bool = False,
    on_report: Callable[[Report], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    parallel: Single | None = None,
) -> VAETokenizer | VQTokenizer:
    """Trains a tokenizer in ``directory``; see the module's docstring.

    Args:
        resume: continue the run in ``directory``; a directory without one starts from the beginning.
        force: resume although the config differs.
        on_report: called after every step.
        on_read: called with (images read, images in all) while the data is read.
        parallel: the processes that train together (`joined`); one if not given.

    Raises:
        UserError: bad data, a directory that holds another run, processes that cannot share a batch evenly, too many non-finite
            steps in a row.
        Interrupted: Ctrl-C; a checkpoint was kept.
    """
    parallel, loop = parallel or Single(), run.train
    with together(parallel):
        check_directory(run, directory, resume, force)
        part = parallel.part(loop.batch_size)
        perceptual = build_perceptual(run.loss, device)
        images = open_images(
            run.data,
            run.tokenizer.image_size,
            batch_size=loop.batch_size,
            seed=run.seed,
            device=device,
            part=part,
            on_read=on_read,
        )
    torch.manual_seed(run.seed)
    with together(parallel):
        trainer = TokenizerStep(run.tokenizer.build().to(device), run, perceptual, parallel)
    first = load_newest(directory, trainer) if resume else 0
    begin_directory(directory, run, parallel)
    _Loop(run, directory, trainer, images, on_report, first).steps_from(first)
    tokenizer = trainer.tokenizer.eval().requires_grad_(False)
    config = tokenizer.config
    if isinstance(tokenizer, VAETokenizer):
        config = replace(config, scale=_scale(tokenizer, images, loop, parallel))
    with together(parallel):
        if parallel.first:
            save_tokenizer(config, tokenizer.state_dict(), directory / "tokenizer")
    finished = config.build().to(device)
    finished.load_state_dict(tokenizer.state_dict())
    return finished


def check_directory(run: TokenizerRun, directory: Path, resume: bool, force: bool) -> None:
    """Refuses to mix runs: another run's directory, or a resumed run whose config changed."""
    require(not directory.exists() or directory.is_dir(), f"{directory} is a file; allowed: a directory for the run")
    config = directory / "config.json"
    if not config.exists():
        return
    require(resume, f"{directory} already holds a run; --resume continues it, or choose another --out")
    changed = differences(read_json(config), to_json(run))
    if changed and not force:
        raise UserError(f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same")


class _Loop:
    """Steps, with what is written in between."""

    def __init__(
        self,
        run: TokenizerRun,
        directory: Path,
        trainer: TokenizerStep,
        images: ImageBatches,
        on_report: Callable[[Report], None] | None,
        first: int,
    ) -> None:
        self.run, self.directory, self.trainer, self.images, self.on_report = run, directory, trainer, images, on_report
        self.parallel = trainer.parallel
        self.log = RunLog(directory, first) if self.parallel.first else None
        self._since, self._since_step = time.monotonic(), first

    def steps_from(self, first: int) -> None:
        """Runs steps ``first`` to the last; Ctrl-C or SIGTERM ends it after a checkpoint."""
        loop, stop = self.run.train, Stop.NO
        checkpoint = self.directory
        with noted_signals() as signals:
            for step in range(first, loop.steps):
                self.trainer.seed(step)
                self.trainer(step, self.images.batch(step))
                done = step + 1
                metrics = self._write_metrics(done) if self._due(done, loop.log_images) else {}
                if self.log is not None and loop.sample_images and self._due(done, loop.sample_images):
                    self._draw(done, self.log)
                stop = self._stop(signals) if done < loop.steps else Stop.NO
                if stop or done == loop.steps or (loop.save_images and self._due(done, loop.save_images)):
                    checkpoint = self._save(done)
                if self.on_report is not None:
                    self.on_report(Report(done, loop.steps, metrics))
                if stop:
                    break
        if self.log is not None:
            self.log.close()
        if stop:
            raise Interrupted(checkpoint)

    def _stop(self, signals: Signals) -> Stop:
        """What all processes agree on."""
        return Stop(self.parallel.most(signals.stop))

    def _due(self, done: int, every_images: int) -> bool:
        """Whether step ``done`` is the first to reach another multiple of ``every_images``, or the last step."""
        batch = self.run.train.batch_size
        return done == self.run.train.steps or done * batch // every_images > (done - 1) * batch // every_images

    def _write_metrics(self, done: int) -> dict[str, float | int]:
        means, skipped, streak = self.trainer.meter.read()
        limit = self.run.train.max_bad_steps
        if streak >= limit:
            kept = newest_checkpoints(self.directory)
            with together(self.parallel):
                raise UserError(
                    f"{streak} steps in a row had a non-finite loss or gradient (train.max_bad_steps is {limit}); try a lower "
                    "--optim.lr or --train.precision float32, and look at the data; "
                    + (f"the last checkpoint is {kept[0]}" if kept else "there is no checkpoint yet")
                )
        now, batch = time.monotonic(), self.run.train.batch_size
        elapsed = max(now - self._since, 1e-9)
        metrics: dict[str, float | int] = {"images": done * batch, "loss": means["l1"] + means.get("perceptual", 0.0), **means}
        # Values run from -1 to 1, so the peak is 2.
        metrics["psnr"] = 10 * math.log10(4 / means["mse"]) if means["mse"] > 0 else float("nan")
        if self.trainer.codebook is not None:
            metrics["codes_used"], metrics["perplexity"] = self.trainer.codebook.read_usage()
        metrics["lr"] = learning_rate(self.run.optim, (done - 1) * batch, self.run.train.steps * batch)
        metrics |= {"skipped_steps": skipped, "images_per_second": (done - self._since_step) * batch / elapsed}
        if self.log is not None:
            self.log.write(done, metrics)
        self._since, self._since_step = now, done
        return metrics

    @torch.no_grad()
    def _draw(self, done: int, log: RunLog) -> None:
        """Images above their reconstructions."""
        began = time.monotonic()
        tokenizer = self.trainer.tokenizer.eval()
        images = self.images.first(_SHOWN)
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one picture
            both = torch.cat((images, tokenizer.reconstruct(tokenizer.encode(images))))
        tokenizer.train()
        picture = grid(to_uint8(both).cpu().numpy(), None, columns=len(images))
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        save_png(picture, folder / f"step-{done:08d}.png")
        log.picture(done, "reconstructions", picture)
        # Drawing is not training: keep it out of images per second.
        self._since += time.monotonic() - began

    def _save(self, done: int) -> Path:
        began = time.monotonic()
        checkpoint = save_checkpoint(self.directory, self.trainer, done, self.run.train.keep)
        self._since += time.monotonic() - began
        return checkpoint


@torch.no_grad()
def _scale(tokenizer: VAETokenizer, images: ImageBatches, loop: TokenizerLoopConfig, parallel: Single) -> float:
    """What brings latents to unit deviation, on about ``measure_images`` training images, each once at most: a shuffled pass."""
    sums = LatentSums(tokenizer.config.network.has_variance)
    with together(parallel), torch.compiler.set_stance("force_eager"):
        for step in range(max(1, min(loop.measure_images, images.count) // loop.batch_size)):
            sums.add(tokenizer.encode(images.plain(step)))
    sums.join(parallel)
    with together(parallel):
        found = sums.statistics()
    return found.scale
