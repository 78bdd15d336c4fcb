"""A sweep as curves: one panel per score, over the longest axis; a line per combination of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from continuar.evaluation.axes import Axis, SweepRow

PANELS = ("frechet_distance", "inception_score", "precision", "recall")


def plot(axes: Sequence[Axis], rows: Sequence[SweepRow]) -> Any:
    """A matplotlib figure."""
    from matplotlib.figure import Figure

    first = rows[0].result
    panels = [name for name in PANELS if name in first["scores"]]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
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
        panel.set_ylabel(first["titles"][name])
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend(fontsize="small")
    return figure


def plot_tradeoff(rows: Sequence[SweepRow]) -> Any:
    """Quality over seconds per image, a curve per model whose points are marked with their value."""
    from matplotlib.figure import Figure

    first = rows[0].result
    panels = [name for name in PANELS if all(name in row.result["scores"] for row in rows)]
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    curves: dict[str, list[SweepRow]] = {}
    for row in rows:
        setting = str(row.point["setting"]).replace("_", " ")
        curves.setdefault(f"{row.point['model']} ({setting})", []).append(row)
    for number, name in enumerate(panels, 1):
        panel = figure.add_subplot(1, len(panels), number)
        for label, members in curves.items():
            points = [(row.seconds_per_image, row.result["scores"][name]) for row in members]
            panel.plot(*zip(*points, strict=True), marker="o", label=label)
            for row, point in zip(members, points, strict=True):
                panel.annotate(str(row.point["value"]), point, xytext=(3, 4), textcoords="offset points", fontsize="x-small")
        panel.set_xscale("log")
        panel.set_xlabel("seconds per image")
        panel.set_ylabel(first["titles"][name])
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="x-small")
    return figure


def save_plot(figure: Any, out: Path) -> None:
    """OUT/plot.png and OUT/plot.svg, the same bytes for the same figure."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "continuar"}):
        figure.savefig(out / "plot.png", dpi=150)
        figure.savefig(out / "plot.svg", metadata={"Date": None})
