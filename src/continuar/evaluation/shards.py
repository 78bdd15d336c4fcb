"""Work cut into shards that survive a kill.

1. A job is a directory with ``job.json``: everything that decides its shards. Another job is not continued there.
2. Shard k is the images k size, k size + 1, ...: one batch. A finished one is ``shards/NNNNNN.safetensors``, and beside it
   ``NNNNNN.json`` with its checksum, written last. One without it, or with another checksum, is made again.
3. Which process makes a shard does not matter to what is in it, and shards are read in their order: results depend neither on the
   number of processes nor on interruptions.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continuar.checkpoints.store import checksum, read_json, read_tensors, write_json, write_tensors
from continuar.configs import differences, to_json
from continuar.errors import UserError, require

JOB = "job.json"
_LOG = logging.getLogger("continuar")


@dataclass(frozen=True)
class Shards:
    """``count`` images in shards of ``size``, of one job in one directory."""

    directory: Path
    job: dict[str, Any]
    count: int
    size: int

    def check(self) -> None:
        """Refuses a directory in which the job can neither begin nor continue.

        Raises:
            UserError: it holds another job, or something else.
        """
        directory, path = self.directory, self.directory / JOB
        require(not directory.exists() or directory.is_dir(), f"--out is the file {directory}; allowed: a directory")
        if path.is_file():
            differing = differences(read_json(path), to_json(self.job))
            listed = "; ".join(differing[:3]) + (f"; {len(differing) - 3} more" if len(differing) > 3 else "")
            require(not differing, f"{directory} holds an evaluation of other settings ({listed}); choose another directory")
        else:
            empty = not directory.exists() or not any(directory.iterdir())
            require(empty, f"{directory} is not empty; choose another directory")

    def begin(self) -> None:
        """Writes the job, if it is not there; not before the first batch is made, so that what a model refuses leaves nothing."""
        if not (self.directory / JOB).is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / JOB, self.job)

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def rows(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def _paths(self, number: int) -> tuple[Path, Path]:
        folder = self.directory / "shards"
        return folder / f"{number:06d}.safetensors", folder / f"{number:06d}.json"

    def save(self, number: int, arrays: dict[str, np.ndarray], seconds: float) -> None:
        """Writes a finished shard, which took so long."""
        data, seal = self._paths(number)
        data.parent.mkdir(exist_ok=True)
        temporary = data.with_name(f".{data.name}.{os.getpid()}.tmp")
        write_tensors(temporary, {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()})
        sealed = {"crc32": checksum(temporary), "images": len(self.rows(number)), "seconds": seconds}
        temporary.replace(data)
        write_json(seal, sealed)

    def is_finished(self, number: int) -> bool:
        """Whether a shard is there, intact; a damaged one is said loudly."""
        data, seal = self._paths(number)
        if not (data.is_file() and seal.is_file()):
            return False
        try:
            intact = checksum(data) == read_json(seal).get("crc32")
        except (UserError, AttributeError):
            intact = False
        if not intact:
            _LOG.warning("shard %s is damaged and made again", data)
            seal.unlink()
        return intact

    def unfinished(self) -> list[int]:
        """The shards that are still to be made."""
        return [n for n in range(len(self)) if not self.is_finished(n)]

    def load(self, number: int) -> tuple[dict[str, np.ndarray], float]:
        """A finished shard's arrays and seconds.

        Raises:
            UserError: it is not there, or its checksum differs.
        """
        data, seal = self._paths(number)
        require(self.is_finished(number), f"{data} is missing or damaged; the same command makes it again")
        return {k: v.numpy() for k, v in read_tensors(data).items()}, float(read_json(seal)["seconds"])

    def discard(self) -> None:
        """Deletes every shard."""
        shutil.rmtree(self.directory / "shards", ignore_errors=True)
