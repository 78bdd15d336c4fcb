"""The config of a run that is cut into slices: overrides by name, the learning rate's end, a continuation from weights alone."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any, TypeVar

from continuar.configs import from_json, to_json
from continuar.errors import require, unknown_name
from continuar.training.config import Run

T = TypeVar("T")

UNPLANNED_IMAGES = 1_000_000_000
"""`train.images` of a run whose end is not planned yet."""
DECAY_SHARE = 0.4
"""The share of all images over which the learning rate falls to zero, at most."""
CAUTION = 0.98
"""The share of the forecast images that is planned for: a run that is cut off before its end has not reached rate zero."""


def override(config: T, assignments: Sequence[str]) -> T:
    """A copy of a config with fields replaced.

    Args:
        assignments: ``field.field=value``; the value is JSON, or else a text.

    Raises:
        UserError: no such field, or a value that is not allowed.
    """
    value = to_json(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        require(bool(equals), f"override is '{assignment}'; allowed: field.field=value")
        *folders, name = path.split(".")
        place = value
        for key in folders:
            place = _entry(place, key, path)
        _entry(place, name, path)
        place[name] = _parse(text)
    return from_json(type(config), value)


def _entry(place: Any, key: str, path: str) -> Any:
    names = list(place) if isinstance(place, dict) else []
    if key not in names:
        raise unknown_name("field", path, [".".join([*path.split(".")[: path.split(".").index(key)], n]) for n in names])
    return place[key]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def plan_end(run: Run, images_done: int, images_to_come: int, images_before: int = 0) -> Run:
    """The run that ends after ``images_to_come`` more images, its learning rate falling linearly to zero.

    The fall takes the last `DECAY_SHARE` of all images and starts no earlier than now, so the rate has no jump. A fall that has
    begun keeps its beginning; its slope follows the new end.

    Args:
        images_done: of this run.
        images_before: of the runs it continues.
    """
    begun = run.train.images - run.optim.decay_images
    total = images_done + max(images_to_come, run.train.batch_size)
    if run.optim.decay == "linear" and begun < images_done:
        start = begun
    else:
        start = max(images_done, total - int(DECAY_SHARE * (images_before + total)))
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, images=total),
        optim=dataclasses.replace(run.optim, decay="linear", decay_images=total - start),
    )


def unplanned(run: Run) -> Run:
    """The run whose end is open: its learning rate stays constant after the warm-up."""
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, images=UNPLANNED_IMAGES),
        optim=dataclasses.replace(run.optim, decay="constant", decay_images=0),
    )


def forecast(rates: Sequence[float], seconds: float) -> int:
    """Images to expect in ``seconds``: the median of the last 20 measured rates (at least one), with some caution."""
    return int(CAUTION * statistics.median(rates[-20:]) * max(0.0, seconds))


def continuation(run: Run, segment: int, rewarm_images: int) -> Run:
    """The run that goes on from weights alone: moments start anew under a fresh warm-up, and other images come first.

    The average keeps its full memory: its own warm-up would throw away the weights that were carried in. The end is open again.
    """
    run = unplanned(run)
    return dataclasses.replace(
        run,
        seed=run.seed + segment,
        optim=dataclasses.replace(run.optim, warmup_images=rewarm_images),
        ema=dataclasses.replace(run.ema, warmup=False),
    )
