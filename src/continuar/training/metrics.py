"""Weights & Biases and trackio, for whom they are installed and asked for. Their interfaces agree in what is used here.

Metrics of a run: JSON lines always, TensorBoard where it is installed.

Scores of generated images while a run trains, within a share of its time.

1. Before the first step: load the network, measure the reference (kept in reference.npz of the run). This does not count.
   Neither does a batch of untrained weights, whose time says what the first scores will take.
2. When scores are due, they are made if all time spent on them stays within the share, by what the last ones took; else they are
   put off until it does.
3. Every score is of the same seeds, so that scores of one run compare with one another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from continuar.checkpoints.store import PipelineConfig
from continuar.config import to_json
from continuar.errors import require
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import load_network
from continuar.evaluation.run import EvaluationOptions, measured
from continuar.evaluation.samples import GeneratedSamples
from continuar.io import write_text
from continuar.pipeline import Pipeline
from continuar.statistics import MomentAccumulator
from continuar.tokenizers import Tokenizer
from continuar.training.config import BaseRun
from continuar.training.data import reads_cache

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
            write_text(self._path, "".join(f"{line}\n" for line in kept))
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


REFERENCE = "reference.npz"


class Online:
    """See the module's docstring. In the first process alone.

    Args:
        run: whose config says how.
        file, tokenizer: of the model that trains.
        directory: the run's.
        device: where features are computed.

    Raises:
        UserError: no such network, weights or reference; samples that the classes do not divide.
    """

    def __init__(self, run: BaseRun, file: PipelineConfig, tokenizer: Tokenizer, directory: Path, device: torch.device) -> None:
        self.config, classes = run.online, max(1, len(file.classes))
        require(
            self.config.samples % classes == 0,
            f"online.samples is {self.config.samples}, which {classes} classes do not divide; allowed: multiples of {classes}",
        )
        require(
            bool(self.config.reference) or not reads_cache(run.data),
            "online.reference is empty, and a cache of latents has no images; allowed: a file of `continuar stats`, or images",
        )
        self.network = load_network(self.config.network, Path(self.config.weights) if self.config.weights else None, device)
        side = int(run.tokenizer.image_size)
        options = EvaluationOptions(self.config.batch_size, reference_images=0, split=run.data.split)
        reference = self.config.reference or run.data.path
        directory.mkdir(parents=True, exist_ok=True)
        self.reference = measured(reference, self.network, (side, side), directory / REFERENCE, options).moments
        self._judged = bool(file.classes) and self.network.classes == file.classes
        self.spent, self._expected = 0.0, self._foreseen(Pipeline(file, file.model.build().to(device), tokenizer))
        self._began = time.monotonic()

    def affordable(self) -> bool:
        """Whether scores of averaged and raw weights, made now, would stay within the share of all time since the beginning."""
        elapsed = time.monotonic() - self._began
        return self.spent + self._expected <= self.config.max_share * (elapsed + self._expected)

    def score(self, pipes: Mapping[str, Pipeline]) -> dict[str, float]:
        """Scores of samples of every pipeline, as ``online/PIPELINE/SCORE``."""
        began, found = time.monotonic(), {}
        for name, pipe in pipes.items():
            found |= {f"online/{name}/{score}": value for score, value in self._score(pipe).items()}
        self._expected = time.monotonic() - began
        self.spent += self._expected
        return found

    def _score(self, pipe: Pipeline) -> dict[str, float]:
        samples, sums, right = GeneratedSamples(pipe, self.config.samples), MomentAccumulator(), []
        for first in range(0, samples.count, self.config.batch_size):
            batch = self.network(samples.make(first, self.config.batch_size))
            sums.add(batch.features_ND)
            if self._judged and batch.logits_NC is not None and samples.labels is not None:
                right.append(batch.logits_NC.argmax(1) == samples.labels[first : first + self.config.batch_size])
        accuracy = {"class_accuracy": float(np.concatenate(right).mean())} if right else {}
        return {"frechet_distance": frechet_distance(sums.moments(), self.reference), **accuracy}

    def _foreseen(self, pipe: Pipeline) -> float:
        """Seconds that the first scores will take, by the second of two batches of untrained weights."""
        samples, size, seconds = GeneratedSamples(pipe, self.config.samples), self.config.batch_size, 0.0
        for _ in range(2):
            began = time.monotonic()
            self.network(samples.make(0, size))
            seconds = time.monotonic() - began
        return 2 * math.ceil(samples.count / size) * seconds
