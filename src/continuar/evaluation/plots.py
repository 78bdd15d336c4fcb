"""A sweep as curves: one panel per score, over the longest axis; a line per combination of the others.

Above the panels stands what was measured, for whoever sees the picture without its command.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continuar.evaluation.axes import Axis, SweepRow

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
        for label, members in lines.items():
            x = [row.point[along] for row in members]
            panel.plot(x if numeric else list(map(str, x)), [r.result["scores"][name] for r in members], marker="o", label=label)
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
        for label, members in curves.items():
            points = [(row.seconds_per_image, row.result["scores"][name]) for row in members]
            panel.plot(*zip(*points, strict=True), marker="o", label=label)
            for row, point in zip(members, points, strict=True):
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
