"""What a slice prints last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shipping.kept import Record


def slice_table(record: Record, metrics: list[dict[str, Any]], results: Path) -> str:
    """Where the job stands, in a few lines."""
    now = record.slices[-1]
    rows = [
        ("images", f"{record.images:,} ({record.images - now['images_before']:,} in this slice, {len(record.segments)} segments)"),
        ("slice", f"{len(record.slices)}, {now['minutes']:.1f} minutes, commit {now['commit'][:12]}"),
        ("machine", f"{now.get('hardware', '-')}, torch {now.get('torch', '-')}, engine {now.get('engine', '-')}"),
    ]
    if metrics:
        last = metrics[-1]
        rows.append(("last metrics", f"loss {last['loss']}, lr {last['lr']:.2e}, {last['images_per_second']:,.0f} images/s"))
    if record.classifier:
        rows.append(("classifier", f"{record.classifier['result']['test_accuracy']:.4f} of real test images"))
    files = sorted(p for p in results.iterdir() if not p.name.startswith("."))
    rows.append(("files", ", ".join(f"{p.name} {p.stat().st_size / 2**20:.2f}" for p in files) + " (MiB)"))
    return "\n" + "\n".join(f"{name:<14}{text}" for name, text in rows)


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """Every measured row, or nothing."""
    if not evaluation:
        return ""
    lines = [f"\nevaluation at {evaluation['images']:,} images"]
    for name, losses in evaluation.get("heldout_loss", {}).get("loss", {}).items():
        lines.append(f"held-out loss  {Path(name).name:<4} " + " ".join(f"{x:.4f}" for x in losses))
    for part in ("accuracy", "distance"):
        found = evaluation.get(part)
        if not found:
            continue
        real = found["squeezenet_frechet_distance_of_as_many_test_images"]
        lines.append(
            f"{part:<10}weights guidance  samples  accuracy (1,000)  distance   "
            f"(real test images: {found['class_accuracy_of_test_images']:.4f}, {real:.2f})"
        )
        for row in found["rows"]:
            lines.append(
                f"{'':<10}{Path(row['model']).name:<7} {row['guidance']:>8} {row['samples']:>8} "
                f"{row['class_accuracy_of_first_1000']:>17.4f} {row['squeezenet_frechet_distance']:>9.2f}"
            )
    return "\n".join(lines)
