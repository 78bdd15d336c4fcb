"""The training loop.

1. Read the images; measure the tokens' std where the run does not give it.
2. Build the model, or restore the newest intact checkpoint of the run.
3. Take the steps, and between them write metrics, sample grids and checkpoints (`Steps`).

Every step is a function of (seed, step), so a resumed run continues the same stream exactly. Several processes do all of this
together (`training.parallel`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from continuar.checkpoints.store import ModelFile, read_json, read_tokenizer, write_json
from continuar.configs import differences, to_json
from continuar.data.images import ImageSet, load_images
from continuar.errors import UserError, require
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.tokenizers import LatentConfig, PixelConfig, Tokenizer
from continuar.training.config import Run
from continuar.training.parallel import Single, together
from continuar.training.state import load_newest
from continuar.training.step import TrainStep
from continuar.training.steps import Interrupted, Report, Steps, matmul_precision
from continuar.training.stream import measure_std
from continuar.training.trackers import TrackerName, check_tracker, open_tracker

__all__ = ["Interrupted", "Report", "train"]
_LOG = logging.getLogger("continuar")
FITTED_IMAGES = 10_000
"""Training images that a tokenizer is fitted to at most, drawn by the run's seed."""


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
    parallel: Single | None = None,
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
    parallel = parallel or Single()
    with together(parallel):
        check_tracker(track)
        check_directory(run, directory, resume, force)
        run = shared_out(run, directory, parallel)
        images = read_images(run, on_read)
        run = measured(run, images)
        tokenizer = fitted(run, images, directory if resume else None)
    parallel.share(list(tokenizer.state_dict().values()))
    torch.manual_seed(run.seed)
    with torch.device(device):
        model = run.model_config(len(images.classes)).build()
    trainer = TrainStep(model, run, parallel)
    first = load_newest(directory, trainer) if resume else 0
    with together(parallel):
        if parallel.first:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "config.json", run)
    with together(parallel):
        found = (directory / "config.json").is_file()
        require(found, f"{directory} is not the same directory for all processes; allowed: one on a file system they share")
    file = ModelFile(model.config, run.tokenizer, images.classes, run.sampling)
    tracker = open_tracker(track, directory, run) if track and parallel.first else None
    steps = Steps(run, directory, file, tokenizer.to(device), trainer, images, on_report, should_stop, tracker, first)
    # What autocast leaves in float32 (time embedding, output layer) may use TF32 in training, never in sampling.
    with matmul_precision("high" if device.type == "cuda" and run.train.precision != "float32" else "highest"):
        try:
            steps.run_from(first)
        finally:
            if tracker is not None:
                tracker.finish()
    return Pipeline.from_pretrained(directory, device=device) if parallel.sharded else Pipeline(file, trainer.ema.model, tokenizer)


def shared_out(run: Run, directory: Path, parallel: Single) -> Run:
    """The run with its micro-batch decided: as given, as the run in ``directory`` has it, or what one process has of a batch.

    Raises:
        UserError: the processes cannot share the batch evenly.
    """
    loop, config = run.train, directory / "config.json"
    size = loop.micro_batch or (read_json(config)["train"].get("micro_batch") if config.exists() else 0)
    if not size:
        allowed = "allowed: a number of processes that divides it"
        require(loop.batch_size % parallel.world == 0, f"{parallel.world} processes for a batch of {loop.batch_size}; {allowed}")
        size = loop.batch_size // parallel.world
    run = dataclasses.replace(run, train=dataclasses.replace(loop, micro_batch=size))
    parallel.slots(run.train.micro_batches)
    return run


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
    old, new = read_json(config), to_json(run)
    # What is decided when a run begins, and what is decided for it elsewhere, is no difference.
    if isinstance(run.tokenizer, PixelConfig) and run.tokenizer.std == 0 and isinstance(old, dict):
        new["tokenizer"]["std"] = old.get("tokenizer", {}).get("std", 0)
    if run.train.micro_batch == 0 and isinstance(old, dict):
        new["train"]["micro_batch"] = old.get("train", {}).get("micro_batch", 0)
    changed = differences(old, new)
    if changed and not force:
        raise UserError(f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same")


def read_images(run: Run, on_read: Callable[[int, int], None] | None) -> ImageSet:
    """The run's training images; what was skipped is said."""
    tokenizer = run.tokenizer
    require(
        not isinstance(tokenizer, LatentConfig),
        "training on latents needs a tokenizer that encodes images; use kind 'pixel'",
    )
    require(bool(run.data.path), "data.path is empty; give a folder of class folders or a Parquet file (--data.path)")
    images = load_images(
        run.data.path,
        size=tokenizer.image_size,
        split=run.data.split,
        max_skipped_share=run.data.max_skipped_share,
        progress=on_read,
    )
    if images.skipped:
        _LOG.warning("%d images could not be read and are skipped: %s", len(images.skipped), "; ".join(images.skipped[:5]))
    expected = run.data.classes
    require(
        expected in (0, len(images.classes)),
        f"the data has {len(images.classes)} classes, data.classes says {expected}",
    )
    return images


def measured(run: Run, images: ImageSet) -> Run:
    """The run with its tokenizer's std filled in from the images, where it has one; a given std that is far off is said."""
    tokenizer = run.tokenizer
    if not isinstance(tokenizer, PixelConfig):
        return run
    unit = dataclasses.replace(tokenizer, std=1.0).build()
    _, std = measure_std(images, lambda x: unit.tokenize(unit.encode(x)))
    require(std > 0, "all training images are of one colour: there is nothing to learn")
    if tokenizer.std == 0:
        return dataclasses.replace(run, tokenizer=dataclasses.replace(tokenizer, std=std))
    if not 0.9 < std / tokenizer.std < 1.1:
        _LOG.warning("tokens have std %.3f, not 1: tokenizer.std is %.4f, measured %.4f", std / tokenizer.std, tokenizer.std, std)
    return run


def fitted(run: Run, images: ImageSet, resumed: Path | None) -> Tokenizer:
    """The run's tokenizer, fitted to the images; the one in a resumed run's checkpoint is kept."""
    kept = newest_checkpoints(resumed) if resumed is not None else []
    if kept:
        return read_tokenizer(kept[0], run.tokenizer)
    tokenizer = run.tokenizer.build()
    chosen = np.random.default_rng(run.seed).permutation(len(images))[:FITTED_IMAGES]
    tokenizer.fit(torch.from_numpy(images.images[chosen]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1))
    return tokenizer
