"""``continuar sweep MODEL --over figure4 --reference R``, ``continuar sweep MODEL MODEL ... --over figure6 --reference R``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import tyro

from continuar.cli.common import local_device, progress_bars
from continuar.cli.evaluate import ScoringOptions
from continuar.distributed import joined
from continuar.errors import require
from continuar.evaluation.reference import REFERENCE_IMAGES
from continuar.evaluation.run import EvaluationOptions
from continuar.evaluation.sweep import AXES, SWEEPS, TRADEOFF, Sweep, markdown_table, parse_axes
from continuar.pipeline import Weights

_OVER = (
    f"Settings: {', '.join(SWEEPS)} (the quantities of the paper's figures), or NAME=A,B,... of {', '.join(AXES)}; several "
    f"of them make a grid. {TRADEOFF} compares several models, time per image against quality: over the steps of autoregressive "
    "models, and over the diffusion_steps of a DiT, whose values may be given beside it."
)


@dataclass(frozen=True)
class Options(ScoringOptions):
    """Options of `continuar sweep`."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")] = ()
    """Run directories, saved models, shipped models, or official MAR checkpoint files; several for figure6 only."""
    over: Annotated[tuple[str, ...], tyro.conf.arg(help=_OVER)] = ()
    images: int = 10_000
    """Images per point, a multiple of the number of classes."""
    batch_size: int = 64
    """Images generated and measured together."""
    reference_images: int = REFERENCE_IMAGES
    """If the reference is images: how many of them to use for precision, recall, density, coverage and the kernel distance."""
    split: str = "train"
    """Part of the reference to read, if it has several, such as "train" or "test"."""
    out: Path = Path("sweep")
    """The directory to write to: table.csv, table.md, plot.png, plot.svg, points/."""


def run(options: Options) -> None:
    """Evaluate a model at every combination of settings, into tables (CSV, Markdown) and plots (PNG, SVG).

    The same command continues an interrupted sweep. Under torchrun the processes share the work.
    """
    compared = TRADEOFF in options.over
    given = [text for text in options.over if text != TRADEOFF]
    axes = parse_axes(given) if given or not compared else ()
    count = len(options.models)
    require(count == 1 or (compared and count > 1), f"{count} models are given; allowed: one, or several for --over {TRADEOFF}")
    require(bool(options.reference), "--reference is missing: what should the images be scored against?")
    evaluation = EvaluationOptions(options.batch_size, options.reference_images, options.split)
    with joined() as group, progress_bars(shown=group.first) as bar:
        sweep = Sweep(
            options.reference,
            options.features.load(local_device(options.device)),
            options.out,
            images=options.images,
            seed=options.seed,
            weights=options.weights,
            settings=options.settings.given(),
            engine=options.settings.engine,
            precision=options.settings.precision,
            evaluation=evaluation,
            group=group,
            bar=bar,
        )
        if compared:
            rows = sweep.compare(options.models, lambda model: options.load(model, options.weights), axes)
        else:
            rows = sweep.run(options.models[0], lambda weights: options.load(options.models[0], cast(Weights, weights)), axes)
    if rows:
        print(f"{markdown_table(rows)}\nwritten  {options.out}: table.csv, table.md, plot.png, plot.svg")
