"""Speed against quality of several models (paper, Figure 6).

1. A model's curve follows from its kind: autoregressive steps where groups of tokens are predicted, diffusion steps of a DiT, and
   one point where every step predicts one token (with a kv-cache, where it is causal).
2. Every point is an evaluation in OUT/points, as of a sweep, and a timing: seconds per image of generating one batch, features left
   out; the median of `REPEATS` after one that does not count.
3. OUT/table.csv and table.md are written after every point, plot.png and plot.svg at the end. An interrupted one continues.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from continuar.baselines import DiTConfig
from continuar.checkpoints.store import read_json, write_json
from continuar.errors import require
from continuar.evaluation.axes import TRADEOFF, Axis, Point, SweepRow
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.plots import plot_tradeoff, save_plot
from continuar.evaluation.processes import Processes
from continuar.evaluation.run import Bar, no_bar
from continuar.evaluation.samples import GeneratedSamples
from continuar.evaluation.sweep import SweepOptions, check, evaluate_point, measure, place_of, samples_at
from continuar.evaluation.tables import write_tables
from continuar.pipeline import Pipeline

STEPS = (8, 16, 32, 64, 128)
"""Autoregressive steps of the paper's curve; those that a model has too few tokens for are left out."""
DIFFUSION_STEPS = (50, 75, 150, 250)
"""Of DiT's curve."""
REPEATS = 3
ONE_POINT = "tokens, one per step"


def tradeoff(
    models: Sequence[str],
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
    """Evaluates and times models at every point of their curves and writes tables and plots into OUT.

    Args:
        models: their names, as ``load`` takes them; all are kept in memory.
        load: from a name to the pipeline.
        axes: values instead of `STEPS` and `DIFFUSION_STEPS`.
        reference, network, options, group, bar: as of `sweep`.

    Returns:
        A row per point, whose point is model, setting and value; none in processes other than the first.

    Raises:
        UserError: as `sweep`; another axis; models of different image sizes.
    """
    group, out = group or Processes(), Path(out)
    names = [axis.name for axis in axes]
    others = [name for name in names if name not in ("steps", "diffusion_steps")]
    allowed = "allowed with it: steps of autoregressive models, diffusion_steps of a DiT"
    require(not others, f"{', '.join(others)} is swept with {TRADEOFF}; {allowed}")
    require(len(set(models)) == len(models), f"a model is given twice: {', '.join(models)}")
    check(axes, options, out, group)
    values = {axis.name: axis.values for axis in axes}
    work: list[tuple[Point, GeneratedSamples]] = []
    for name in models:
        pipe = load(name)
        for setting, value in curve(pipe, values):
            swept: Point = {} if setting == ONE_POINT else {setting: value}
            samples = samples_at(pipe, name, options.weights, swept, options)
            work.append(({"model": name, "setting": setting, "value": value}, samples))
    sizes = {samples.size for _, samples in work}
    require(len(sizes) == 1, f"the models make images of {' and '.join(map(str, sorted(sizes)))}; allowed: one size")
    own = measure(reference, network, work[0][1].size, out, options.evaluation, bar) if group.is_first else reference
    measured, rows = group.share(own), []
    for point, samples in work:
        result = evaluate_point(samples, measured, network, out, point, options.evaluation, group, bar)
        if result is not None:
            seconds = seconds_per_image(samples, options.evaluation.batch_size, place_of(out, point) / "speed.json")
            rows.append(SweepRow(point, result, seconds))
            write_tables(out, rows)
        group.wait()  # while one is timed, the others rest
    if rows:
        save_plot(plot_tradeoff(rows), out)
    return rows


def curve(pipe: Pipeline, values: Mapping[str, Sequence[int | float | str]]) -> list[tuple[str, int | float | str]]:
    """(setting, value) of every point of a model.

    Args:
        values: by setting, instead of the usual ones.
    """
    config = pipe.file.model
    if isinstance(config, DiTConfig):
        return [("diffusion_steps", value) for value in values.get("diffusion_steps", DIFFUSION_STEPS)]
    positions = config.tokens.positions
    if config.order.max_group is None:
        usual = [steps for steps in STEPS if steps <= positions]
        return [("steps", value) for value in values.get("steps", usual or [positions])]
    return [(ONE_POINT, positions)]


def seconds_per_image(samples: GeneratedSamples, batch: int, file: Path) -> float:
    """Of generating one batch, from labels to pixels; kept in ``file``."""
    if file.is_file():
        found = read_json(file)
        if found["batch_size"] == batch:
            return float(found["seconds_per_image"])
    took = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        samples.make(0, batch)
        took.append((time.perf_counter() - began) / batch)
    seconds = statistics.median(took[1:])
    write_json(file, {"seconds_per_image": seconds, "batch_size": batch, "repeats": took[1:]})
    return seconds
