"""Sweeps: one evaluation per combination of settings, into tables and plots; an interrupted sweep continues with the same command.

1. Axes are settings of `Pipeline.__call__` with their values, or ``weights``; points are all combinations, the last axis fastest.
2. The reference is measured once, into OUT/reference.npz.
3. Each point is an evaluation of its own in OUT/points; a finished one is read, an interrupted one continued.
4. OUT/table.csv and table.md are written after every point, plot.png and plot.svg at the end.

The trade-off of speed and quality (paper, Figure 6) compares several models the same way. The kind of a model decides its curve:
autoregressive steps if groups of tokens are predicted, diffusion steps of a DiT, and one point if every step predicts one token.
Each point is also timed: seconds per image of generating one batch, features left out; the median of `REPEATS` after a warm-up.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from continuar.config import members
from continuar.distributed import SingleProcess
from continuar.errors import UserError, require, unknown_name
from continuar.evaluation.networks import FeatureNetwork
from continuar.evaluation.reference import open_reference
from continuar.evaluation.run import Bar, EvaluationOptions, evaluate, finished, measured, no_bar
from continuar.evaluation.samples import GeneratedSamples, hxw
from continuar.heads import HeadOptions, option_names
from continuar.io import read_json, write_json, write_text
from continuar.models.dit import DiTConfig
from continuar.pipeline import EngineName, Pipeline
from continuar.sampling.fast.weights import Precision


def _axes() -> dict[str, Callable[[str], int | float | str]]:
    """The settings of every model and the options of every head; a new head needs no line here."""
    hints = {"steps": int, "temperature": float, "guidance_scale": float, "guidance_schedule": str, "weights": str}
    for options in members(HeadOptions):
        types = get_type_hints(options)
        hints |= {name: types[name] for name in option_names(options)}
    # The other types are literals of strings, whose values the options check.
    return {name: kind if kind in (int, float) else str for name, kind in hints.items()}


AXES = _axes()
"""Name of every setting that can be swept -> the function that reads its values."""


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
"""The sweep that compares several models; see `Sweep.compare`."""


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Reads axes from texts such as "steps=8,16", "diffusion-steps=50,100" or "figure4".

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
        values = tuple(read(v.strip()) for v in listed.split(",") if v.strip())
    except ValueError as problem:
        raise UserError(f"the axis {name} has the values '{listed}'; allowed: {read.__name__}s, separated by commas") from problem
    return Axis(name, values)


Point = dict[str, int | float | str]
"""Settings by name."""


def points(axes: Sequence[Axis]) -> Iterator[Point]:
    """Yields every combination."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.name for axis in axes), values, strict=True))


def _named(point: Point) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in point.items())


@dataclass(frozen=True)
class SweepRow:
    """A point, and the content of its evaluation's result.json."""

    point: Point
    result: dict[str, Any]
    seconds_per_image: float | None = None
    """Time of generation only; None if it was not timed."""


STEPS = (8, 16, 32, 64, 128)
"""Autoregressive steps of the paper's curve; those beyond a model's number of tokens are left out."""
DIFFUSION_STEPS = (50, 75, 150, 250)
"""Diffusion steps of DiT's curve."""
ONE_POINT = "tokens, one per step"
REPEATS = 3


def curve(pipe: Pipeline, values: Mapping[str, Sequence[int | float | str]]) -> list[tuple[str, int | float | str]]:
    """Returns (setting, value) of every point of a model in the trade-off.

    Args:
        values: by setting, instead of `STEPS` and `DIFFUSION_STEPS`.
    """
    config = pipe.config.model
    if isinstance(config, DiTConfig):
        return [("diffusion_steps", value) for value in values.get("diffusion_steps", DIFFUSION_STEPS)]
    seq_len = config.tokens.seq_len
    if config.order.max_group is None:
        usual = [steps for steps in STEPS if steps <= seq_len]
        return [("steps", value) for value in values.get("steps", usual or [seq_len])]
    return [(ONE_POINT, seq_len)]


@dataclass(frozen=True)
class Sweep:
    """Everything that the points of a sweep have in common; `run` and `compare` evaluate them and write tables and plots."""

    reference: str | Path
    """Passed to `evaluate`, like ``network``, ``group`` and ``bar``."""
    network: FeatureNetwork
    out: Path
    images: int
    """Per point, a multiple of the number of classes."""
    seed: int = 0
    """Seed of the first image, the same at every point: differences between points are then less noisy."""
    weights: str = "ema"
    """Used if ``weights`` is not an axis."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are neither swept nor the model's own."""
    engine: EngineName = "auto"
    precision: Precision = "float32"
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    group: SingleProcess = field(default_factory=SingleProcess)
    bar: Bar = no_bar

    def run(self, model: str, load: Callable[[str], Pipeline], axes: Sequence[Axis]) -> list[SweepRow]:
        """Evaluates a model at every point.

        Args:
            model: its name, for the report.
            load: from "ema" or "raw" to the pipeline.

        Returns:
            A row per point; none in processes other than the first.

        Raises:
            UserError: as `evaluate`; a setting that is swept and fixed; no matplotlib.
        """
        self._check(axes)
        found = [(point, str(point.get("weights", self.weights))) for point in points(axes)]
        load = lru_cache(maxsize=1)(load)  # one pipeline at a time in memory
        for point, _ in found:  # whatever the model cannot take is refused before the work begins
            self._samples(load(found[0][1]), model, found[0][1], point)
        work = ((point, self._samples(load(weights), model, weights, point)) for point, weights in found)
        rows = self._evaluate(work, timed=False)
        if rows:
            save_plot(plot(axes, rows), self.out)
        return rows

    def compare(self, models: Sequence[str], load: Callable[[str], Pipeline], axes: Sequence[Axis]) -> list[SweepRow]:
        """Evaluates and times models at every point of their curves.

        Args:
            models: their names, as ``load`` takes them; all are kept in memory.
            axes: values instead of `STEPS` and `DIFFUSION_STEPS`.

        Returns:
            A row per point, whose point is model, setting and value; none in processes other than the first.

        Raises:
            UserError: as `run`; another axis; models of different image sizes.
        """
        others = [axis.name for axis in axes if axis.name not in ("steps", "diffusion_steps")]
        allowed = "allowed with it: steps of autoregressive models, diffusion_steps of a DiT"
        require(not others, f"{', '.join(others)} is swept with {TRADEOFF}; {allowed}")
        require(len(set(models)) == len(models), f"a model is given twice: {', '.join(models)}")
        self._check(axes)
        values = {axis.name: axis.values for axis in axes}
        work: list[tuple[Point, GeneratedSamples]] = []
        for name in models:
            pipe = load(name)
            for setting, value in curve(pipe, values):
                swept: Point = {} if setting == ONE_POINT else {setting: value}
                point: Point = {"model": name, "setting": setting, "value": value}
                work.append((point, self._samples(pipe, name, self.weights, swept)))
        sizes = {samples.size for _, samples in work}
        require(len(sizes) == 1, f"the models make images of {' and '.join(map(str, sorted(sizes)))}; allowed: one size")
        rows = self._evaluate(work, timed=True)
        if rows:
            save_plot(plot_tradeoff(rows), self.out)
        return rows

    def _check(self, axes: Sequence[Axis]) -> None:
        """Refuses a setting that is swept and fixed, a missing matplotlib, and a directory that is not a sweep's."""
        twice = [axis.name for axis in axes if axis.name in self.settings]
        require(not twice, f"{', '.join(twice)} is both swept and set; allowed: one of them")
        require(find_spec("matplotlib") is not None, "plots need matplotlib: pip install 'continuar[metrics]'")
        out = self.out
        ours = not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / "points").is_dir()))
        # The first process may already have begun when another one looks.
        require(ours or not self.group.first, f"{out} is not an empty directory, nor a sweep's; choose another directory")

    def _samples(self, pipe: Pipeline, model: str, weights: str, point: Point) -> GeneratedSamples:
        """Returns the samples of a point, or refuses the point by its name."""
        try:
            return GeneratedSamples(
                pipe,
                self.images,
                seed=self.seed,
                settings={**self.settings, **{name: value for name, value in point.items() if name != "weights"}},
                engine=self.engine,
                precision=self.precision,
                name=model,
                weights=weights,
            )
        except UserError as problem:
            raise UserError(f"at {_named(point)}: {problem}") from problem

    def _evaluate(self, work: Iterable[tuple[Point, GeneratedSamples]], *, timed: bool) -> list[SweepRow]:
        """Evaluates points in order and writes the tables after each."""
        rows: list[SweepRow] = []
        reference: str | Path | None = None
        for point, samples in work:
            if reference is None:
                reference = self.group.share_object(self._measured_reference(samples.size) if self.group.first else self.reference)
            result = self._evaluate_point(samples, reference, point)
            if result is not None:
                seconds = self._seconds_per_image(samples, point) if timed else None
                rows.append(SweepRow(point, result, seconds))
                # After every point, so that an interrupted sweep has a table.
                write_text(self.out / "table.csv", csv_table(rows))
                write_text(self.out / "table.md", markdown_table(rows))
            if timed:
                self.group.wait()  # the others must not compute while the first process is timed
        return rows

    def _measured_reference(self, size: tuple[int, int]) -> str | Path:
        """Returns a file with the reference's statistics, so that no point measures it again."""
        if open_reference(self.reference, self.network, size, self.evaluation.split).is_ready:
            return self.reference
        (self.out / "points").mkdir(parents=True, exist_ok=True)
        target = self.out / "reference.npz"
        measured(self.reference, self.network, size, target, self.evaluation, self.bar)
        return target

    def _evaluate_point(self, samples: GeneratedSamples, reference: str | Path, point: Point) -> dict[str, Any] | None:
        """Reads or computes the result of a point; None in processes other than the first."""
        # Features of every point would fill a disk: 20 KB per image with the Inception network.
        place, options = self._place(point), replace(self.evaluation, discard_shards=True)
        found = finished(samples, reference, self.network, place, options) if self.group.first else None
        if self.group.share_object(found is not None):
            return found

        def bar(description: str) -> Callable[[int, int], None]:
            return self.bar(f"{description} ({_named(point)})")

        report = evaluate(samples, reference, self.network, place, options=options, group=self.group, bar=bar)
        return None if report is None else report.to_json()

    def _place(self, point: Point) -> Path:
        """Returns the directory of a point's evaluation."""
        return self.out / "points" / "_".join(re.sub(r"[^\w.+-]+", "-", f"{k}-{v}") for k, v in point.items())

    def _seconds_per_image(self, samples: GeneratedSamples, point: Point) -> float:
        """Times one batch from labels to pixels; kept in speed.json of the point."""
        file, batch = self._place(point) / "speed.json", self.evaluation.batch_size
        if file.is_file():
            found = read_json(file)
            # Time per image depends on the batch size.
            if found["batch_size"] == batch:
                return float(found["seconds_per_image"])
        took = []
        # The first one compiles, captures and warms up; it does not count.
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            samples.make(0, batch)
            took.append((time.perf_counter() - began) / batch)
        seconds = statistics.median(took[1:])
        write_json(file, {"seconds_per_image": seconds, "batch_size": batch, "repeats": took[1:]})
        return seconds


def csv_table(rows: Sequence[SweepRow]) -> str:
    """Formats points, scores by their plain names at full precision, and speed, for programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores, timed = _common_scores(rows), rows[0].seconds_per_image is not None
    writer.writerow([*rows[0].point, *scores, "images_per_second", *(["seconds_per_image"] if timed else [])])
    for row in rows:
        values = [row.result["scores"][name] for name in scores]
        seconds = [row.seconds_per_image] if timed else []
        writer.writerow([*row.point.values(), *values, row.result["speed"]["images_per_second"], *seconds])
    return text.getvalue()


def _common_scores(rows: Sequence[SweepRow]) -> list[str]:
    """The scores that every point has; models may differ in whether their classes are the network's."""
    return [name for name in rows[0].result["scores"] if all(name in row.result["scores"] for row in rows)]


def markdown_table(rows: Sequence[SweepRow]) -> str:
    """Formats the same for people, under the names that scores may be called by, after a line on what was measured."""
    first, timed = rows[0].result, rows[0].seconds_per_image is not None
    samples, reference, network = first["samples"], first["reference"], first["network"]
    # Standard deviations stay in the CSV; the table would be too wide.
    scores = [name for name in _common_scores(rows) if not name.endswith("_std")]
    head = [*(name.replace("_", " ") for name in rows[0].point), *(first["titles"][name] for name in scores)]
    who = "" if "model" in rows[0].point else f"{samples['model']}: "
    lines = [
        f"{who}{samples['images']} images of {hxw(samples['size'])} per row, seed {samples['seed']}; "
        f"reference {reference['source']}: {reference['images']} images, of them "
        f"{reference['images_of_precision_and_recall']} for precision and recall; "
        f"network {network['name']}, weights SHA-256 {network['sha256'][:12]}",
        "",
        "| " + " | ".join([*head, "ms/image" if timed else "images/s"]) + " |",
        "|" + "---|" * (len(head) + 1),
    ]
    for row in rows:
        speed = row.result["speed"]["images_per_second"] if row.seconds_per_image is None else 1e3 * row.seconds_per_image
        cells = [*(str(v) for v in row.point.values()), *(f"{row.result['scores'][name]:.4g}" for name in scores)]
        lines.append("| " + " | ".join([*cells, "" if speed is None else f"{speed:.3g}"]) + " |")
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
    """Draws one panel per score over the longest axis, with a line per combination of the others; a matplotlib figure."""
    along = max(axes, key=lambda axis: len(axis.values)).name
    curves: dict[str, list[SweepRow]] = {}
    for row in rows:
        curves.setdefault(_named({k: v for k, v in row.point.items() if k != along}), []).append(row)
    numeric = all(isinstance(row.point[along], int | float) for row in rows)
    figure, panels = _figure(4.2, rows, {axis.name for axis in axes})
    for name, panel in panels.items():
        for label, line in curves.items():
            x = [row.point[along] for row in line]
            panel.plot(x if numeric else list(map(str, x)), [r.result["scores"][name] for r in line], marker="o", label=label)
        panel.set_xlabel(along.replace("_", " "))
        if len(curves) > 1:
            panel.legend(fontsize="small")
    return figure


def plot_tradeoff(rows: Sequence[SweepRow]) -> Any:
    """Draws quality over seconds per image, a curve per model whose points are marked with their value; a matplotlib figure."""
    from matplotlib.ticker import LogLocator, NullFormatter

    models = {str(row.point["model"]) for row in rows}
    short = {model: Path(model).name or model for model in models}
    # Paths of runs are long; their last parts serve if they differ.
    names = short if len(set(short.values())) == len(models) else {model: model for model in models}
    curves: dict[str, list[SweepRow]] = {}
    for row in rows:
        setting = str(row.point["setting"]).replace("_", " ")
        curves.setdefault(f"{names[str(row.point['model'])]} ({setting})", []).append(row)
    figure, panels = _figure(4.8, rows, {str(row.point["setting"]) for row in rows})
    for name, panel in panels.items():
        for label, line in curves.items():
            xy = [(row.seconds_per_image, row.result["scores"][name]) for row in line]
            panel.plot(*zip(*xy, strict=True), marker="o", label=label)
            for row, place in zip(line, xy, strict=True):
                panel.annotate(str(row.point["value"]), place, xytext=(3, 4), textcoords="offset points", fontsize="x-small")
        panel.set_xscale("log")
        # Room for the values beside the points; numbers on the axis even if the curves span less than a decade.
        panel.margins(x=0.12, y=0.1)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("seconds per image")
        panel.legend(fontsize="x-small")
    return figure


def _figure(panel_width: float, rows: Sequence[SweepRow], swept: set[str]) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel per score under a heading that says what was measured, for whoever sees it without its command."""
    from matplotlib.figure import Figure

    first, common = rows[0].result, _common_scores(rows)
    names = [name for name in PANELS if name in common]
    samples, reference, every = first["samples"], first["reference"], [row.result["samples"]["settings"] for row in rows]
    model = "" if "model" in rows[0].point else f"{samples['model']}: "
    source = Path(reference["source"]).name
    what = f"{model}{samples['images']} images per point, held against {reference['images']} of {source}"
    same = {k: v for k, v in every[0].items() if k not in swept and all(other.get(k) == v for other in every)}
    width = panel_width * len(names)
    lines = [part for text in (what, _named(same)) for part in textwrap.wrap(text, int(width * _CHARACTERS_PER_INCH))]
    figure = Figure(figsize=(width, 3.4 + 0.18 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize="small")
    panels = {name: figure.add_subplot(1, len(names), number) for number, name in enumerate(names, 1)}
    for name, panel in panels.items():
        panel.set_title(PANELS[name], fontsize="small")
        panel.set_ylabel(first["titles"][name])
        panel.grid(alpha=0.3, which="both")
    return figure, panels


def save_plot(figure: Any, out: Path) -> None:
    """Writes OUT/plot.png and OUT/plot.svg, the same bytes for the same figure."""
    import matplotlib as mpl

    # Without a fixed salt and date, an SVG differs with every run.
    with mpl.rc_context({"svg.hashsalt": "continuar"}):
        figure.savefig(out / "plot.png", dpi=150)
        figure.savefig(out / "plot.svg", metadata={"Date": None})
