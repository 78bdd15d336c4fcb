"""What a sweep goes over: settings with their values, written as "steps=8,16" or by the name of a figure.

A sweep's results as tables: CSV for programs, Markdown for people.

A sweep as curves: one panel per score, over the longest axis; a line per combination of the others.

Above the panels stands what was measured, for whoever sees the picture without its command.

Speed against quality of several models (paper, Figure 6).

1. A model's curve follows from its kind: autoregressive steps where groups of tokens are predicted, diffusion steps of a DiT, and
   one point where every step predicts one token (with a kv-cache, where it is causal).
2. Every point is an evaluation in OUT/points, as of a sweep, and a timing: seconds per image of generating one batch, features left
   out; the median of `REPEATS` after one that does not count.
3. OUT/table.csv and table.md are written after every point, plot.png and plot.svg at the end. An interrupted one continues.

Sweeps: one evaluation per combination of settings, a table, a plot; an interrupted sweep continues with the same command.

1. Axes are settings of `Pipeline.__call__` with their values, or ``weights``; points are all combinations, the last axis fastest.
2. The reference is measured once, into OUT/reference.npz.
3. Each point is an evaluation of its own in OUT/points; a finished one is read, an interrupted one continued.
4. OUT/table.csv and table.md are written after every point, plot.png and plot.svg at the end.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from continuar.checkpoints.store import read_json, write_json, write_text
from continuar.config import members
from continuar.distributed import EvaluationProcesses
from continuar.errors import UserError, require, unknown_name
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.reference import open_reference
from continuar.evaluation.run import Bar, EvaluationOptions, OnProgress, evaluate, finished, measured, no_bar
from continuar.evaluation.samples import GeneratedSamples, by
from continuar.heads import HeadOptions, option_names
from continuar.models.dit import DiTConfig
from continuar.pipeline import Pipeline
from continuar.sampling.engines import EngineName
from continuar.sampling.fast.weights import Precision


def _axes() -> dict[str, Callable[[str], int | float | str]]:
    """The settings of every model, and the options of every head: a new head needs no line here."""
    hints = {"steps": int, "temperature": float, "guidance_scale": float, "guidance_schedule": str, "weights": str}
    for options in members(HeadOptions):
        types = get_type_hints(options)
        hints |= {name: types[name] for name in option_names(options)}
    return {name: kind if kind in (int, float) else str for name, kind in hints.items()}


AXES = _axes()
"""What can be swept, and how its values are read."""


@dataclass(frozen=True)
class Axis:
    """A setting and its values, all different."""

    name: str
    values: tuple[int | float | str, ...]

    def __post_init__(self) -> None:
        if self.name not in AXES:
            raise unknown_name("axis", self.name, AXES)
        require(bool(self.values), f"the axis {self.name} has no values; allowed: {self.name}=A,B,...")
        listed = ", ".join(map(str, self.values))
        require(len(set(self.values)) == len(self.values), f"the axis {self.name} has a value twice: {listed}")
        require(self.name != "weights" or {"ema", "raw"} >= set(self.values), f"weights is '{listed}'; allowed: ema, raw")


SWEEPS: dict[str, Axis] = {
    "figure4": Axis("diffusion_steps", (10, 25, 50, 75, 100, 200)),
    "figure5": Axis("temperature", (0.9, 0.92, 0.94, 0.96, 0.98, 1.0, 1.02, 1.04)),
}
"""The quantities of the paper's Figures 4 and 5 by name; the values are ours."""
TRADEOFF = "figure6"
"""The sweep that compares several models; see `evaluation.tradeoff`."""


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Axes from texts such as "steps=8,16", "diffusion-steps=50,100" or "figure4".

    Raises:
        UserError: none, an unknown name, a value that cannot be read, or an axis twice.
    """
    axes = tuple(_parse_axis(text) for text in texts)
    require(bool(axes), f"no axis is given; allowed: {', '.join((*SWEEPS, TRADEOFF))}, or NAME=A,B,... of {', '.join(AXES)}")
    names = [axis.name for axis in axes]
    require(len(set(names)) == len(names), f"an axis is given twice: {', '.join(names)}")
    return axes


def _parse_axis(text: str) -> Axis:
    name, equals, listed = text.partition("=")
    if not equals:
        if name not in SWEEPS:
            raise unknown_name("sweep", name, [*SWEEPS, TRADEOFF, *(f"{a}=..." for a in AXES)])
        return SWEEPS[name]
    name = name.replace("-", "_")
    if name not in AXES:
        raise unknown_name("axis", name, AXES)
    read = AXES[name]
    try:
        return Axis(name, tuple(read(v.strip()) for v in listed.split(",") if v.strip()))
    except UserError:
        raise
    except ValueError as problem:
        raise UserError(f"the axis {name} has the values '{listed}'; allowed: {read.__name__}s, separated by commas") from problem


Point = dict[str, int | float | str]
"""Settings by name."""


def points(axes: Sequence[Axis]) -> Iterator[Point]:
    """Every combination."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.name for axis in axes), values, strict=True))


@dataclass(frozen=True)
class SweepRow:
    """A point, and what result.json of its evaluation holds."""

    point: Point
    result: dict[str, Any]
    seconds_per_image: float | None = None
    """Of generation alone, where that was measured."""


def write_tables(out: Path, rows: Sequence[SweepRow]) -> None:
    """OUT/table.csv and OUT/table.md."""
    write_text(out / "table.csv", csv_table(rows))
    write_text(out / "table.md", markdown_table(rows))


def csv_table(rows: Sequence[SweepRow]) -> str:
    """Points, scores by their plain names at full precision, images per second; seconds per image where they were measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores, loss_by_timestep = _common_scores(rows), rows[0].seconds_per_image is not None
    writer.writerow([*rows[0].point, *scores, "images_per_second", *(["seconds_per_image"] if loss_by_timestep else [])])
    for row in rows:
        values = [row.result["scores"][name] for name in scores]
        time = [row.seconds_per_image] if loss_by_timestep else []
        writer.writerow([*row.point.values(), *values, row.result["speed"]["images_per_second"], *time])
    return text.getvalue()


def _common_scores(rows: Sequence[SweepRow]) -> list[str]:
    """What every point has; models may differ in whether their classes are the network's."""
    return [name for name in rows[0].result["scores"] if all(name in row.result["scores"] for row in rows)]


def markdown_table(rows: Sequence[SweepRow]) -> str:
    """The same under the names that scores may be called by, after a line on what was measured."""
    first, first_point = rows[0].result, rows[0].point
    samples, reference, network = first["samples"], first["reference"], first["network"]
    scores, loss_by_timestep = (
        [name for name in _common_scores(rows) if not name.endswith("_std")],
        rows[0].seconds_per_image is not None,
    )
    speed = "ms/image" if loss_by_timestep else "images/s"
    head = [*(name.replace("_", " ") for name in first_point), *(first["titles"][name] for name in scores), speed]
    who = "" if "model" in first_point else f"{samples['model']}: "
    lines = [
        f"{who}{samples['images']} images of {by(samples['size'])} per row, seed {samples['seed']}; "
        f"reference {reference['source']}: {reference['images']} images, of them "
        f"{reference['images_of_precision_and_recall']} for precision and recall; "
        f"network {network['name']}, weights SHA-256 {network['sha256'][:12]}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        rate = row.result["speed"]["images_per_second"] if row.seconds_per_image is None else 1e3 * row.seconds_per_image
        cells = [*(str(v) for v in row.point.values()), *(f"{row.result['scores'][name]:.4g}" for name in scores)]
        lines.append("| " + " | ".join([*cells, "" if rate is None else f"{rate:.3g}"]) + " |")
    return "\n".join(lines) + "\n"


PANELS = {
    "frechet_distance": "lower is better",
    "inception_score": "higher is better",
    "precision": "higher is better",
    "recall": "higher is better",
}
"""The scores that are drawn, and which way they get better."""
_CHARACTERS_PER_INCH = 14


def plot(axes: Sequence[Axis], rows: Sequence[SweepRow]) -> Any:
    """A matplotlib figure."""
    first, swept = rows[0].result, {axis.name for axis in axes}
    panels = [name for name in PANELS if name in first["scores"]]
    figure = _figure(4.2 * len(panels), rows, swept)
    along = max(axes, key=lambda axis: len(axis.values)).name
    lines: dict[str, list[SweepRow]] = {}
    for row in rows:
        label = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row.point.items() if k != along)
        lines.setdefault(label, []).append(row)
    numeric = all(isinstance(row.point[along], int | float) for row in rows)
    for number, name in enumerate(panels, 1):
        panel = figure.add_subplot(1, len(panels), number)
        for label, group_rows in lines.items():
            x = [row.point[along] for row in group_rows]
            panel.plot(x if numeric else list(map(str, x)), [r.result["scores"][name] for r in group_rows], marker="o", label=label)
        panel.set_xlabel(along.replace("_", " "))
        _describe(panel, name, first)
        if len(lines) > 1:
            panel.legend(fontsize="small")
    return figure


def plot_tradeoff(rows: Sequence[SweepRow]) -> Any:
    """Quality over seconds per image, a curve per model whose points are marked with their value."""
    from matplotlib.ticker import LogLocator, NullFormatter

    first = rows[0].result
    panels = [name for name in PANELS if all(name in row.result["scores"] for row in rows)]
    figure = _figure(4.8 * len(panels), rows, {str(row.point["setting"]) for row in rows})
    models = {str(row.point["model"]) for row in rows}
    short = {model: Path(model).name or model for model in models}
    names = short if len(set(short.values())) == len(models) else {model: model for model in models}
    curves: dict[str, list[SweepRow]] = {}
    for row in rows:
        setting = str(row.point["setting"]).replace("_", " ")
        curves.setdefault(f"{names[str(row.point['model'])]} ({setting})", []).append(row)
    for number, name in enumerate(panels, 1):
        panel = figure.add_subplot(1, len(panels), number)
        for label, group_rows in curves.items():
            points = [(row.seconds_per_image, row.result["scores"][name]) for row in group_rows]
            panel.plot(*zip(*points, strict=True), marker="o", label=label)
            for row, point in zip(group_rows, points, strict=True):
                panel.annotate(str(row.point["value"]), point, xytext=(3, 4), textcoords="offset points", fontsize="x-small")
        panel.set_xscale("log")
        # Room for the values beside the points; numbers on the axis even where curves span less than a decade.
        panel.margins(x=0.12, y=0.1)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("seconds per image")
        _describe(panel, name, first)
        panel.legend(fontsize="x-small")
    return figure


def _figure(width: float, rows: Sequence[SweepRow], swept: set[str]) -> Any:
    """An empty figure under the words of `_heading`, as high as those need."""
    from matplotlib.figure import Figure

    lines = [part for text in _heading(rows, swept) for part in textwrap.wrap(text, int(width * _CHARACTERS_PER_INCH))]
    figure = Figure(figsize=(width, 3.4 + 0.18 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize="small")
    return figure


def _heading(rows: Sequence[SweepRow], swept: set[str]) -> list[str]:
    """What was measured; and the settings that are the same at every point and not swept."""
    first, every = rows[0].result, [row.result["samples"]["settings"] for row in rows]
    samples, reference = first["samples"], first["reference"]
    model = f"{samples['model']}: " if "model" not in rows[0].point else ""
    name = Path(reference["source"]).name
    what = f"{model}{samples['images']} images per point, held against {reference['images']} of {name}"
    same = {k: v for k, v in every[0].items() if k not in swept and all(other.get(k) == v for other in every)}
    return [what, ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in same.items())]


def _describe(panel: Any, name: str, result: dict[str, Any]) -> None:
    panel.set_title(PANELS[name], fontsize="small")
    panel.set_ylabel(result["titles"][name])
    panel.grid(alpha=0.3, which="both")


def save_plot(figure: Any, out: Path) -> None:
    """OUT/plot.png and OUT/plot.svg, the same bytes for the same figure."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "continuar"}):
        figure.savefig(out / "plot.png", dpi=150)
        figure.savefig(out / "plot.svg", metadata={"Date": None})


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
    group: EvaluationProcesses | None = None,
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
    group, out = group or EvaluationProcesses(), Path(out)
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
    positions = config.tokens.seq_len
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
    group: EvaluationProcesses | None = None,
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
    group, out = group or EvaluationProcesses(), Path(out)
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


def check(axes: Sequence[Axis], options: SweepOptions, out: Path, group: EvaluationProcesses) -> None:
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
    group: EvaluationProcesses,
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
