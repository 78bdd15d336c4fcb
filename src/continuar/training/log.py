"""Metrics of a run: JSON lines always, TensorBoard where it is installed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from continuar.training.trackers import Tracker

_LOG = logging.getLogger("continuar")


class RunLog:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` of a run directory.

    Args:
        directory: the run's.
        step: lines and events after this step belong to a stretch that is trained again, and are dropped.
        tracker: gets the numbers, too; who made it ends it.
    """

    def __init__(self, directory: Path, step: int, tracker: Tracker | None = None) -> None:
        self._tracker = tracker
        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            _LOG.warning("no TensorBoard curves: pip install 'continuar[train]' (metrics.jsonl is written all the same)")
            self._board = None
        else:
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """One line and one TensorBoard point per value; numbers that are not finite are written as null."""
        finite = {k: v if np.isfinite(v) else None for k, v in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A picture for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> int:
    """The step of a line; a line torn by a crash belongs to no step that is kept."""
    try:
        value: Any = json.loads(line)
    except ValueError:
        return 2**62
    return int(value["step"]) if isinstance(value, dict) and "step" in value else 2**62
