"""The training loop.

1. Open the data and the tokenizer (`training.source`).
2. Build the model, with the weights the run begins with (`training.initial`), or restore the newest intact checkpoint of the run.
3. Take the steps, and between them write metrics, sample grids and checkpoints (`Steps`).

Every step is a function of (seed, step), so a resumed run continues the same stream exactly. Several processes do all of this
together (`training.parallel`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from continuar.checkpoints.store import ModelFile, read_json, write_json
from continuar.configs import differences, from_json, to_json
from continuar.errors import UserError, require
from continuar.model import Model
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.precision import matmul_precision
from continuar.tokenizers import PixelConfig
from continuar.training.advice import warn
from continuar.training.config import BaseRun
from continuar.training.initial import begin_from
from continuar.training.online import Online
from continuar.training.parallel import Single, together
from continuar.training.source import reads_cache, training_data
from continuar.training.state import load_newest
from continuar.training.step import TrainStep
from continuar.training.steps import Interrupted, Report, Steps
from continuar.training.trackers import TrackerName, check_tracker, open_tracker

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
        data = training_data(run, on_read, directory if resume else None)
    run, tokenizer = data.run, data.tokenizer
    if parallel.first:
        warn(run)
    if not reads_cache(run.data):
        parallel.share(list(tokenizer.state_dict().values()))  # fitted, which hardware may round otherwise
    torch.manual_seed(run.seed)
    with torch.device(device):
        model = run.model_config(len(data.classes)).build()
    with together(parallel):
        if run.init and not (resume and newest_checkpoints(directory)):
            assert isinstance(model, Model)  # a DiT's run refuses it
            begin_from(model, run.init, tokenizer)
    trainer = TrainStep(model, run, parallel)
    first = load_newest(directory, trainer) if resume else 0
    file = ModelFile(model.config, run.tokenizer, data.classes, run.sampling)
    with together(parallel):
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


def shared_out(run: BaseRun, directory: Path, parallel: Single) -> BaseRun:
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
    old, new = to_json(from_json(type(run), read_json(config), str(config))), to_json(run)
    if isinstance(run.tokenizer, PixelConfig) and run.tokenizer.std == 0 and isinstance(old, dict):
        new["tokenizer"]["std"] = old.get("tokenizer", {}).get("std", 0)
    if reads_cache(run.data):
        new["tokenizer"] = old["tokenizer"]
    if run.train.micro_batch == 0:
        new["train"]["micro_batch"] = old["train"]["micro_batch"]
    changed = differences(old, new)
    if changed and not force:
        raise UserError(f"the run in {directory} has another config ({'; '.join(changed)}); --force continues it all the same")


def begin_directory(directory: Path, run: object, parallel: Single) -> None:
    """Makes the run directory with its ``config.json``.

    Raises:
        UserError: it cannot be written, or is not one directory for all processes.
    """
    with together(parallel):
        if parallel.first:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "config.json", run)
    with together(parallel):
        found = (directory / "config.json").is_file()
        require(found, f"{directory} is not the same directory for all processes; allowed: one on a file system they share")
