"""A sweep's results as tables: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from continuar.checkpoints.store import write_text
from continuar.evaluation.axes import SweepRow
from continuar.evaluation.images import by


def write_tables(out: Path, rows: Sequence[SweepRow]) -> None:
    """OUT/table.csv and OUT/table.md."""
    write_text(out / "table.csv", csv_table(rows))
    write_text(out / "table.md", markdown_table(rows))


def csv_table(rows: Sequence[SweepRow]) -> str:
    """Points, scores by their plain names at full precision, images per second; seconds per image where they were measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores, timed = _common_scores(rows), rows[0].seconds_per_image is not None
    writer.writerow([*rows[0].point, *scores, "images_per_second", *(["seconds_per_image"] if timed else [])])
    for row in rows:
        values = [row.result["scores"][name] for name in scores]
        time = [row.seconds_per_image] if timed else []
        writer.writerow([*row.point.values(), *values, row.result["speed"]["images_per_second"], *time])
    return text.getvalue()


def _common_scores(rows: Sequence[SweepRow]) -> list[str]:
    """What every point has; models may differ in whether their classes are the network's."""
    return [name for name in rows[0].result["scores"] if all(name in row.result["scores"] for row in rows)]


def markdown_table(rows: Sequence[SweepRow]) -> str:
    """The same under the names that scores may be called by, after a line on what was measured."""
    first, first_point = rows[0].result, rows[0].point
    samples, reference, network = first["samples"], first["reference"], first["network"]
    scores, timed = [name for name in _common_scores(rows) if not name.endswith("_std")], rows[0].seconds_per_image is not None
    speed = "ms/image" if timed else "images/s"
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
