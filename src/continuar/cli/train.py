"""``continuar train RECIPE``."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass

import torch

from continuar.cli.common import TrainingOptions, progress_bars, tokens_text
from continuar.config import to_json
from continuar.data.loader import class_names
from continuar.distributed import Kind, expandable_segments, joined
from continuar.errors import require
from continuar.models.base import parameter_counts
from continuar.recipes import RECIPES
from continuar.training.config import BaseRun, warn
from continuar.training.data import reads_cache, training_data
from continuar.training.estimate import generation_flops, training_flops
from continuar.training.metrics import TrackerName
from continuar.training.trainer import Report, train


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of `continuar train` besides the recipe's own fields."""

    recipes = RECIPES

    max_minutes: float = 0.0
    """Stop after this many minutes, with a checkpoint from which --resume continues; 0: run to the end."""
    parallel: Kind = "ddp"
    """Division of the work among the processes that torchrun starts. ddp: each holds all weights. fsdp: each holds its share of
    weights, gradients, moments and averages."""
    track: TrackerName | None = None
    """Send metrics to Weights & Biases or trackio as well; it must be installed."""


def run(options: Options) -> None:
    """Train a model by a recipe.

    continuar train RECIPE [options]
    torchrun --nproc-per-node N -m continuar train RECIPE [options]     on N GPUs or processes: docs/scaling.md
    continuar train --list          recipes, one line each
    continuar train RECIPE --help   every field of the recipe, with its value there
    continuar train RECIPE --dry-run
    """
    if options.dry_run:
        print(dry_run(options.run), end="")
        return
    minutes, directory = options.max_minutes, options.directory
    require(0 <= minutes < math.inf, f"--max-minutes is {minutes}; allowed: 0 or more")
    expandable_segments()
    device = options.process_device()
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    last = Report(0, 0, {})
    with joined(options.parallel, device) as parallel:
        with progress_bars(parallel.first) as bar:
            training = bar("training")

            def on_report(report: Report) -> None:
                nonlocal last
                last, m = report, report.metrics
                training(report.step, report.steps, f"loss {m['loss']:.3f}  {m['images_per_second']:,.0f} images/s" if m else "")

            train(
                options.run,
                directory,
                device=device,
                resume=options.resume,
                force=options.force,
                on_report=on_report,
                on_read=bar("reading images"),
                should_stop=lambda: time.monotonic() >= end,
                parallel=parallel,
                track=options.track,
            )
        if parallel.first and last.step < last.steps:
            why = f"after {minutes:g} minutes" if time.monotonic() >= end else "on request"
            print(f"stopped {why} at step {last.step:,} of {last.steps:,}: {directory}  (--resume continues it)")
        elif parallel.first:
            print(f"trained: {directory}  (continuar sample {directory})")


def dry_run(run: BaseRun) -> str:
    """The resolved config and its cost, as text; no model is allocated."""
    classes = run.data.classes
    if reads_cache(run.data):
        data = training_data(run)
        run, classes = data.run, len(data.classes)
    elif not classes and run.data.path:
        classes = len(class_names(run.data.path, run.data.split))
    warn(run)
    # The number of classes is unknown without data. It changes the size of one small embedding only.
    config = run.model_config(classes or 1)
    with torch.device("meta"):
        model = config.build()
    parts = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in parameter_counts(model))
    parameters = sum(p.numel() for p in model.parameters())
    sampling = ", ".join(f"{name} {value}" for name, value in run.sampling.to_dict().items() if value is not None)
    flops = training_flops(config, run.train.activation_checkpointing)
    lines = [
        json.dumps(to_json(run), indent=2),
        f"classes           {classes or 'read from the data'}",
        f"parameters        {parameters / 1e6:.2f}M ({parts})",
        f"tokens per image  {tokens_text(config.tokens)}",
        f"training          {run.train.steps:,} steps of {run.train.batch_size} images",
        f"FLOPs per image   training {_flops(flops)} (forward and backward, mean mask ratio)",
        f"                  generation {_flops(generation_flops(config, run.sampling))} ({sampling})",
    ]
    return "\n".join(lines) + "\n"


def _flops(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"
