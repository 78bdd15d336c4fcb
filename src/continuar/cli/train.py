"""``continuar train RECIPE``."""

from __future__ import annotations

import inspect
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from continuar.cli.common import parse, split_recipe
from continuar.config import to_json
from continuar.data.loader import class_names
from continuar.devices import expandable_segments, pick_device
from continuar.distributed import Kind, joined, local_device, processes
from continuar.errors import require
from continuar.models.base import parameter_counts
from continuar.recipes import RECIPES, find_recipe
from continuar.training.config import BaseRun, warn
from continuar.training.data import reads_cache, training_data
from continuar.training.estimate import generation_flops, training_flops
from continuar.training.metrics import TrackerName
from continuar.training.trainer import Report, train

_HELP = """usage: continuar train RECIPE [options]
       torchrun --nproc-per-node N -m continuar train RECIPE [options]     on N GPUs or processes: docs/scaling.md
       continuar train --list          recipes, one line each
       continuar train RECIPE --help   every field of the recipe, with its value there
       continuar train RECIPE --dry-run
"""


@dataclass(frozen=True)
class Arguments:
    """Options beside the recipe's own fields."""

    run: Annotated[BaseRun, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run directory; runs/RECIPE if not given."""
    resume: bool = False
    """Continue the run in that directory exactly where its newest intact checkpoint stands."""
    force: bool = False
    """Resume although the config differs from the one the run began with."""
    max_minutes: float = 0.0
    """End after so many minutes with a checkpoint that --resume continues; 0: run to the end."""
    parallel: Kind = "ddp"
    """How processes started by torchrun train together: ddp, each with all weights; or fsdp, each with its share of weights,
    gradients, moments and averages."""
    track: TrackerName | None = None
    """Send metrics to Weights & Biases or trackio, too, if it is installed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dry_run: bool = False
    """Print the resolved config, parameters, tokens and FLOPs per image, and stop."""


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    chosen = split_recipe(arguments, "continuar train", _HELP, RECIPES)
    if chosen is None:
        return 0
    name, rest = chosen
    recipe = find_recipe(name)
    description = inspect.getdoc(recipe) or ""
    options = parse(Arguments, rest, prog=f"continuar train {name}", description=description, default=Arguments(recipe()))
    if options.dry_run:
        print(dry_run(options.run), end="")
        return 0
    minutes = options.max_minutes
    require(0 <= minutes < math.inf, f"--max-minutes is {minutes}; allowed: 0 or more")
    directory = options.out or Path("runs") / name
    expandable_segments()
    device = pick_device(options.device)
    device = local_device(device) if processes() else device
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    with joined(options.parallel, device) as parallel:
        with _progress(parallel.first) as progress:
            bar = _Bar(progress, "training")
            train(
                options.run,
                directory,
                device=device,
                resume=options.resume,
                force=options.force,
                on_report=bar.report,
                on_read=_Bar(progress, "reading images").update,
                should_stop=lambda: time.monotonic() >= end,
                parallel=parallel,
                track=options.track,
            )
        if parallel.first and bar.done < bar.total:
            why = f"after {minutes:g} minutes" if time.monotonic() >= end else "when asked to"
            print(f"stopped {why} at step {bar.done:,} of {bar.total:,}: {directory}  (--resume continues it)")
        elif parallel.first:
            print(f"trained: {directory}  (continuar sample {directory})")
    return 0


class _Bar:
    """A progress bar that appears when there is progress to show."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._task: TaskID | None = None
        self.done = self.total = 0

    def update(self, done: int, total: int, status: str | None = None) -> None:
        self.done, self.total = done, total
        if self._task is None:
            self._task = self._progress.add_task(self._name, total=total, status="")
        self._progress.update(self._task, completed=done, total=total)
        if status is not None:
            self._progress.update(self._task, status=status)

    def report(self, report: Report) -> None:
        m = report.metrics
        status = f"loss {m['loss']:.3f}  {m['images_per_second']:,.0f} images/s" if m else None
        self.update(report.step, report.steps, status)


def dry_run(run: BaseRun) -> str:
    """The resolved config and what it costs; no model is allocated."""
    classes = run.data.classes
    if reads_cache(run.data):
        data = training_data(run)
        run, classes = data.run, len(data.classes)
    elif not classes and run.data.path:
        classes = len(class_names(run.data.path, run.data.split))
    warn(run)
    # Without data at hand the number of classes is unknown; it moves one small embedding.
    config = run.model_config(classes or 1)
    with torch.device("meta"):
        model = config.build()
    parts = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in parameter_counts(model))
    parameters = sum(p.numel() for p in model.parameters())
    spec = config.tokens
    tokens = f"of dim {spec.dim}" if spec.kind == "vector" else f"of {spec.vocabulary} ids"
    lines = [
        json.dumps(to_json(run), indent=2),
        f"classes           {classes or 'read from the data'}",
        f"parameters        {parameters / 1e6:.2f}M ({parts})",
        f"tokens per image  {spec.seq_len} ({spec.grid[0]} x {spec.grid[1]}) {tokens}",
        f"training          {run.train.steps:,} steps of {run.train.batch_size} images",
        f"FLOPs per image   training {_flops(training_flops(config, run.train.activation_checkpointing))} "
        "(forward and backward, mean mask ratio)",
        f"                  generation {_flops(generation_flops(config, run.sampling))} "
        f"({', '.join(f'{name} {value}' for name, value in run.sampling.to_dict().items() if value is not None)})",
    ]
    return "\n".join(lines) + "\n"


def _flops(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[status]}"), console=console, disable=not shown)
