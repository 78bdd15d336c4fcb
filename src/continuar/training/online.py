"""Scores of generated images while a run trains, within a share of its time.

1. Before the first step: load the network, measure the reference (kept in reference.npz of the run). This does not count.
   Neither does a batch of untrained weights, whose time says what the first scores will take.
2. When scores are due, they are made if all time spent on them stays within the share, by what the last ones took; else they are
   put off until it does.
3. Every score is of the same seeds, so that scores of one run compare with one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from continuar.checkpoints.store import ModelFile
from continuar.errors import require
from continuar.evaluation.moments import MomentAccumulator, frechet_distance
from continuar.evaluation.networks import load_network
from continuar.evaluation.run import EvaluationOptions, measured
from continuar.evaluation.samples import GeneratedSamples
from continuar.pipeline import Pipeline
from continuar.tokenizers import Tokenizer
from continuar.training.config import BaseRun
from continuar.training.source import reads_cache

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

    def __init__(self, run: BaseRun, file: ModelFile, tokenizer: Tokenizer, directory: Path, device: torch.device) -> None:
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
