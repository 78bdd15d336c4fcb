"""Sweeps: one evaluation per combination of settings, a table, a plot; an interrupted sweep continues with the same command.

1. Axes are settings of `Pipeline.__call__` with their values, or ``weights``; points are all combinations, the last axis fastest.
2. The reference is measured once, into OUT/reference.npz.
3. Each point is an evaluation of its own in OUT/points; a finished one is read, an interrupted one continued.
4. OUT/table.csv and table.md are written after every point, plot.png and plot.svg at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from continuar.errors import UserError, require
from continuar.evaluation.axes import Axis, Point, SweepRow, points
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.plots import plot, save_plot
from continuar.evaluation.processes import Processes
from continuar.evaluation.reference import open_reference
from continuar.evaluation.run import Bar, EvaluationOptions, OnProgress, evaluate, finished, measured, no_bar
from continuar.evaluation.samples import GeneratedSamples
from continuar.evaluation.tables import write_tables
from continuar.generation.engines import EngineName
from continuar.generation.weights import Precision
from continuar.pipeline import Pipeline


@dataclass(frozen=True)
class SweepOptions:
    """What all points have in common."""

    images: int
    """Per point, a multiple of the number of classes."""
    seed: int = 0
    weights: str = "ema"
    """Where ``weights`` is not an axis."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are neither swept nor the model's own."""
    engine: EngineName = "auto"
    precision: Precision = "float32"
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)


def sweep(
    model: str,
    load: Callable[[str], Pipeline],
    axes: Sequence[Axis],
    reference: str | Path,
    network: FeatureNetwork,
    out: str | Path,
    *,
    options: SweepOptions,
    group: Processes | None = None,
    bar: Bar = no_bar,
) -> list[SweepRow]:
    """Evaluates a model at every point and writes tables and plots into OUT.

    Args:
        model: its name, for the report.
        load: from "ema" or "raw" to the pipeline.
        reference, network, group, bar: as of `evaluate`.

    Returns:
        A row per point; none in processes other than the first.

    Raises:
        UserError: as `evaluate`; a setting that is swept and fixed; no matplotlib.
    """
    group, out = group or Processes(), Path(out)
    check(axes, options, out, group)
    weights_of = {i: str(point.get("weights", options.weights)) for i, point in enumerate(points(axes))}
    pipes = {weights_of[0]: load(weights_of[0])}
    for point in points(axes):  # what the model cannot take is refused before the work begins
        samples_at(pipes[weights_of[0]], model, weights_of[0], point, options)
    rows: list[SweepRow] = []
    against: str | Path | None = None
    for number, point in enumerate(points(axes)):
        weights = weights_of[number]
        if weights not in pipes:
            pipes = {weights: load(weights)}  # one at a time in memory
        samples = samples_at(pipes[weights], model, weights, point, options)
        if against is None:
            own = measure(reference, network, samples.size, out, options.evaluation, bar) if group.is_first else reference
            against = group.share(own)
        result = evaluate_point(samples, against, network, out, point, options.evaluation, group, bar)
        if result is not None:
            rows.append(SweepRow(point, result))
            write_tables(out, rows)
    if rows:
        save_plot(plot(axes, rows), out)
    return rows


def check(axes: Sequence[Axis], options: SweepOptions, out: Path, group: Processes) -> None:
    """Refuses a setting that is swept and fixed, a missing matplotlib, and a directory in which no sweep can begin or continue."""
    twice = [axis.name for axis in axes if axis.name in options.settings]
    require(not twice, f"{', '.join(twice)} is both swept and set; allowed: one of them")
    require(find_spec("matplotlib") is not None, "plots need matplotlib: pip install 'continuar[metrics]'")
    if not group.is_first:
        return
    ours = not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / "points").is_dir()))
    require(ours, f"{out} is not an empty directory, nor a sweep's; choose another directory")


def samples_at(pipe: Pipeline, model: str, weights: str, point: Point, options: SweepOptions) -> GeneratedSamples:
    """The samples of a point.

    Raises:
        UserError: as `GeneratedSamples`, with the point.
    """
    settings = {**options.settings, **{name: value for name, value in point.items() if name != "weights"}}
    try:
        return GeneratedSamples(
            pipe,
            options.images,
            seed=options.seed,
            settings=settings,
            engine=options.engine,
            precision=options.precision,
            name=model,
            weights=weights,
        )
    except UserError as problem:
        raise UserError(f"at {named(point)}: {problem}") from problem


def named(point: Point) -> str:
    """A point for people."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point.items())


def evaluate_point(
    samples: GeneratedSamples,
    reference: str | Path,
    network: FeatureNetwork,
    out: Path,
    point: Point,
    options: EvaluationOptions,
    group: Processes,
    bar: Bar,
) -> dict[str, Any] | None:
    """The result of a point, read or computed; None in processes other than the first."""
    place = place_of(out, point)
    options = replace(options, discard_shards=True)
    found = finished(samples, reference, network, place, options) if group.is_first else None
    if group.share(found is not None):
        return found

    def bar_of_point(description: str) -> OnProgress:
        return bar(f"{description} ({named(point)})")

    report = evaluate(samples, reference, network, place, options=options, group=group, bar=bar_of_point)
    return None if report is None else report.to_json()


def place_of(out: Path, point: Point) -> Path:
    """Where the evaluation of a point lies."""
    return out / "points" / "_".join(re.sub(r"[^\w.+-]+", "-", f"{k}-{v}") for k, v in point.items())


def measure(
    path: str | Path, network: FeatureNetwork, size: tuple[int, int], out: Path, options: EvaluationOptions, bar: Bar
) -> str | Path:
    """A file with the reference's statistics, so that no point measures it again."""
    if open_reference(path, network, size, options.split).is_ready:
        return path
    (out / "points").mkdir(parents=True, exist_ok=True)
    target = out / "reference.npz"
    measured(path, network, size, target, options, bar)
    return target
