"""``continuar sample MODEL``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from continuar.checkpoints.store import write_json
from continuar.cli.head_options import AnyHeadOptions, given
from continuar.cli.parse import parse
from continuar.errors import require
from continuar.generation.plan import make_plan
from continuar.pictures import grid, save_png
from continuar.pipeline import Pipeline, load, shipped_models


@dataclass(frozen=True)
class Arguments:
    """Generate images from a model."""

    model: tyro.conf.Positional[str]
    """A run directory, a saved model, or a shipped name."""
    classes: str = ""
    """Class names or numbers, separated by commas; every class if not given (at most 10)."""
    per_class: int = 4
    """Images per class."""
    seed: int = 0
    """Seed of the first image; each further image takes the next number."""
    steps: int | None = None
    """Autoregressive steps, 1 to the number of tokens."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 0 or more; 1 is none."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """How guidance grows over the steps."""
    temperature: float | None = None
    """0 or more; lower is less diverse."""
    head: Annotated[AnyHeadOptions, tyro.conf.arg(name="")] = field(default_factory=AnyHeadOptions)
    batch_size: int = 64
    """Images generated at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of a training run."""
    out: Path = Path("samples")
    """The directory to write to: 00000.png ..., grid.png, samples.json."""


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    shipped = ", ".join(shipped_models()) or "none"
    description = f"Generate images from a model. Settings that are not given are the model's own. Shipped models: {shipped}."
    options = parse(Arguments, arguments, prog="continuar sample", description=description)
    require(options.per_class >= 1, f"--per-class is {options.per_class}; allowed: 1 or more")
    pipe = load(options.model, weights=options.weights, device=options.device)
    labels = _labels(pipe, options.classes, options.per_class)
    count = len(labels) if labels else options.per_class
    seeds = [options.seed + i for i in range(count)]
    settings = pipe.defaults.override(
        steps=options.steps,
        guidance=options.guidance,
        guidance_schedule=options.guidance_schedule,
        temperature=options.temperature,
        **given(options.head),
    )
    require(options.batch_size >= 1, f"--batch-size is {options.batch_size}; allowed: 1 or more")
    make_plan(pipe.model.order, settings, pipe.model.order.positions)  # refuses steps that the model cannot take
    _check_writable(options.out)
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("generating", total=None)
        images = pipe(
            labels,
            seeds,
            **settings.to_dict(),
            batch_size=options.batch_size,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    names = [pipe.classes[i] for i in labels] if labels else None
    entries = []
    for i, pixels in enumerate(images):
        file = f"{i:05d}.png"
        save_png(pixels, options.out / file)
        entry = {"file": file, "label": labels[i] if labels else None, "class_name": names[i] if names else None}
        entries.append({**entry, "seed": seeds[i], **settings.to_dict(), "model": options.model, "weights": options.weights})
    save_png(grid(images, names, columns=options.per_class if labels else 0), options.out / "grid.png")
    write_json(options.out / "samples.json", entries)
    print(f"{len(images)} images: {options.out / 'grid.png'}")
    return 0


def _labels(pipe: Pipeline, classes: str, per_class: int) -> list[int] | None:
    """The label of each image, class by class; None for a model without classes."""
    if not pipe.classes:
        require(not classes, f"--classes is '{classes}'; the model has no classes")
        return None
    names = [c.strip() for c in classes.split(",") if c.strip()]
    chosen = [pipe.label(name) for name in names] if names else list(range(min(10, len(pipe.classes))))
    return [label for label in chosen for _ in range(per_class)]


def _check_writable(directory: Path) -> None:
    """Fails before the work, not after it."""
    require(not directory.exists() or directory.is_dir(), f"--out is the file {directory}; allowed: a directory")
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".writable"
    probe.touch()
    probe.unlink()
