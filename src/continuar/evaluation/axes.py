"""What a sweep goes over: settings with their values, written as "steps=8,16" or by the name of a figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from continuar.configs import members
from continuar.errors import UserError, require, unknown_name
from continuar.heads import HeadOptions, option_names


def _axes() -> dict[str, Callable[[str], int | float | str]]:
    """The settings of every model, and the options of every head: a new head needs no line here."""
    hints = {"steps": int, "temperature": float, "guidance": float, "guidance_schedule": str, "weights": str}
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
