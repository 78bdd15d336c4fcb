"""Loss and learning rate over all slices, as a picture."""

from __future__ import annotations

import argparse
import json
import statistics

from continuar.errors import require
from shipping.kept import METRICS

SMOOTHED = 5
"""Lines of the metrics whose median is one point."""


def draw_curves(options: argparse.Namespace) -> None:
    """Writes ``--to``: the training loss by t and by how much is masked, and the learning rate, over images."""
    from matplotlib.figure import Figure

    metrics = options.results / METRICS
    require(metrics.is_file(), f"{metrics} does not exist; allowed: a folder of results")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    groups = [lines[i : i + SMOOTHED] for i in range(0, len(lines) - SMOOTHED + 1, SMOOTHED)]
    images = [group[-1]["images"] / 1e6 for group in groups]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    *panels, rate = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for panel, prefix, title in zip(panels, ("loss_by_time/", "loss_by_masked/"), ("by t / T", "by share masked"), strict=True):
        for name in ["loss", *sorted(name for name in lines[-1] if name.startswith(prefix))]:
            points = [statistics.median([line[name] for line in group if name in line] or [float("nan")]) for group in groups]
            panel.plot(images, points, label=name.removeprefix(prefix), linewidth=2 if name == "loss" else 1)
        panel.set(xlabel="million images", ylabel="training loss", yscale="log", title=title)
        panel.legend(fontsize="small")
    rate.plot([line["images"] / 1e6 for line in lines], [line["lr"] for line in lines])
    rate.set(xlabel="million images", ylabel="learning rate")
    for panel in (*panels, rate):
        panel.grid(alpha=0.3)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.to, dpi=110)
    print(f"{options.to}: {len(lines)} lines, {lines[-1]['images']:,} images, last loss {lines[-1]['loss']:.4f}")
