"""What happens when skipping single bad steps is not enough.

1. A step with a non-finite loss or gradient changes nothing (`step`). After ``max_bad_steps`` of them in a row, or when weights
   themselves are not finite, the run goes back to its newest intact checkpoint; such weights are never saved.
2. From there on all draws are others, because the same ones would lead to the same place.
3. If no checkpoint was written since the last time, it goes one checkpoint further back than then.
4. After ``max_rollbacks`` times in the life of the run, it stops.

How often a run went back is part of its checkpoints: a run that is killed and resumed takes the same way.
"""

from __future__ import annotations

import logging
from pathlib import Path

from continuar.errors import require
from continuar.pipeline import newest_checkpoints
from continuar.training.config import LoopConfig
from continuar.training.state import load_newest
from continuar.training.step import TrainStep

_LOG = logging.getLogger("continuar")
_ADVICE = (
    "try a lower --optim.lr, a longer --optim.warmup-images, or --train.precision float32, and look at the data (a changed run is "
    "resumed with --force)"
)


class Rollback:
    """Takes a trainer back; see the module's docstring."""

    def __init__(self, directory: Path, trainer: TrainStep, loop: LoopConfig) -> None:
        self._directory, self._trainer, self._loop = directory, trainer, loop
        self._since_saved = 0

    def saved(self) -> None:
        """A checkpoint was written."""
        self._since_saved = 0

    def __call__(self, problem: str) -> int:
        """Restores a checkpoint, says so loudly and returns the steps that are done in it; all processes together.

        Args:
            problem: what is wrong, and since when.

        Raises:
            UserError: there is no checkpoint, or this happened too often.
        """
        trainer, limit = self._trainer, self._loop.max_rollbacks
        kept = newest_checkpoints(self._directory)
        require(bool(kept), f"{problem}; {_ADVICE}; there is no checkpoint yet")
        times = trainer.rollbacks + 1
        often = f"the run went back {trainer.rollbacks} times before (train.max_rollbacks is {limit})"
        require(times <= limit, f"{problem}; {often}; {_ADVICE}; the last checkpoint is {kept[0]}")
        step = load_newest(self._directory, trainer, skip=min(self._since_saved, len(kept) - 1))
        self._since_saved += 1
        trainer.rollbacks = times
        trainer.meter.reset()
        if trainer.parallel.first:
            _LOG.error("%s: back to step %d, with other draws from there (rollback %d of %d)", problem, step, times, limit)
        return step
