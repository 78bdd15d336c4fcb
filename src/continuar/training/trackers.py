"""Weights & Biases and trackio, for whom they are installed and asked for. Their interfaces agree in what is used here."""

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from continuar.configs import to_json
from continuar.errors import require
from continuar.training.config import BaseRun

TrackerName = Literal["wandb", "trackio"]
PROJECT = "continuar"


class Tracker(Protocol):
    """A run over there."""

    def log(self, metrics: dict[str, float | int], step: int) -> object:
        """Metrics of one step."""
        ...

    def finish(self) -> object:
        """Sends what is left."""
        ...


def check_tracker(name: TrackerName | None) -> None:
    """Refuses one that is not installed, before anything is begun."""
    require(name is None or find_spec(name) is not None, f"--track {name} needs a package: pip install {name}")


def open_tracker(name: TrackerName, directory: Path, run: BaseRun) -> Tracker:
    """Starts a run named like ``directory`` in the project "continuar", or continues the one that was started for it."""
    # wandb tells runs apart by an id, trackio by their name.
    place = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()
    identity = {"id": place} if name == "wandb" else {}
    return import_module(name).init(project=PROJECT, name=directory.name, config=to_json(run), resume="allow", **identity)
