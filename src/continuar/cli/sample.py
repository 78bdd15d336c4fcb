"""``continuar sample MODEL``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from continuar.cli.common import Model, Settings, at_least, make_writable, progress_bars, write_samples
from continuar.errors import require
from continuar.pictures import MAX_FRAMES, grid, save_gif, save_png, thinned
from continuar.pipeline import Pipeline
from continuar.sampling.known_tokens import Snapshot


@dataclass(frozen=True)
class Options:
    """Options of `continuar sample`."""

    model: Model
    classes: str = ""
    """Class names or numbers, separated by commas; every class if not given (at most 10)."""
    per_class: int = 4
    """Images per class."""
    seed: int = 0
    """Seed of the first image; each further image takes the next number."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    animate: bool = False
    """Also write grid.gif, which shows the images after each step."""
    out: Path = Path("samples")
    """The directory to write to: 00000.png ..., grid.png, samples.json; grid.gif with --animate."""


def run(options: Options) -> None:
    """Generate images from a model. Settings that are not given are the model's own."""
    at_least(1, per_class=options.per_class)
    pipe = options.settings.load(options.model)
    labels = _labels(pipe, options.classes, options.per_class)
    count = len(labels) if labels else options.per_class
    seeds = pipe.seeds(options.seed, count)
    settings, running = options.settings.options(pipe), options.settings.running()
    pipe.engine(options.settings.engine, options.settings.precision)
    make_writable(options.out)
    snapshots: list[Snapshot] = []
    with progress_bars() as bar:
        on_progress = bar("generating")
        if options.animate:
            for snapshot in pipe.stream(labels, seeds, **running, **settings.to_dict()):
                snapshots.append(snapshot)
                on_progress(snapshot.step, snapshot.steps)
            images = snapshots[-1].image()
        else:
            images = pipe(labels, seeds, on_progress=on_progress, **running, **settings.to_dict())
    names = [pipe.classes[i] for i in labels] if labels else None
    entries = [
        {"label": labels[i] if labels else None, "class_name": names[i] if names else None, "seed": seeds[i]} for i in range(count)
    ]
    write_samples(options.out, images, entries, {**settings.to_dict(), **options.settings.record(options.model)})
    columns = options.per_class if labels else 0
    save_png(grid(images, names, columns), options.out / "grid.png")
    if snapshots:
        save_gif([grid(kept.image(), names, columns) for kept in thinned(snapshots, MAX_FRAMES)], options.out / "grid.gif")
    print(f"{len(images)} images: {options.out / ('grid.gif' if snapshots else 'grid.png')}")


def _labels(pipe: Pipeline, classes: str, per_class: int) -> list[int] | None:
    """The label of each image, class by class; None for a model without classes."""
    if not pipe.classes:
        require(not classes, f"--classes is '{classes}'; the model has no classes")
        return None
    names = [c.strip() for c in classes.split(",") if c.strip()]
    chosen = [pipe.label(name) for name in names] if names else list(range(min(10, len(pipe.classes))))
    return [label for label in chosen for _ in range(per_class)]
