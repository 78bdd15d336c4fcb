"""A sweep's results as tables: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from continuar.checkpoints.store import write_text
from continuar.evaluation.axes import Axis, SweepRow
from continuar.evaluation.images import by


def write_tables(out: Path, axes: Sequence[Axis], rows: Sequence[SweepRow]) -> None:
    """OUT/table.csv and OUT/table.md."""
    write_text(out / "table.csv", csv_table(axes, rows))
    write_text(out / "table.md", markdown_table(axes, rows))


def csv_table(axes: Sequence[Axis], rows: Sequence[SweepRow]) -> str:
    """Axes, scores by their plain names at full precision, images per second."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = list(rows[0].result["scores"])
    writer.writerow([*(a.name for a in axes), *scores, "images_per_second"])
    for row in rows:
        values = [row.result["scores"][name] for name in scores]
        writer.writerow([*row.point.values(), *values, row.result["speed"]["images_per_second"]])
    return text.getvalue()


def markdown_table(axes: Sequence[Axis], rows: Sequence[SweepRow]) -> str:
    """The same under the names that scores may be called by, after a line on what was measured."""
    first = rows[0].result
    samples, reference, network = first["samples"], first["reference"], first["network"]
    scores = [name for name in first["scores"] if not name.endswith("_std")]
    head = [*(a.name.replace("_", " ") for a in axes), *(first["titles"][name] for name in scores), "images/s"]
    lines = [
        f"{samples['model']}: {samples['images']} images of {by(samples['size'])} per row, seed {samples['seed']}; "
        f"reference {reference['source']}: {reference['images']} images, of them "
        f"{reference['images_of_precision_and_recall']} for precision and recall; "
        f"network {network['name']}, weights SHA-256 {network['sha256'][:12]}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        rate = row.result["speed"]["images_per_second"]
        cells = [*(str(v) for v in row.point.values()), *(f"{row.result['scores'][name]:.4g}" for name in scores)]
        lines.append("| " + " | ".join([*cells, "" if rate is None else f"{rate:.3g}"]) + " |")
    return "\n".join(lines) + "\n"
