"""What is evaluated: images that a model generates, or images that lie somewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from continuar.configs import to_json
from continuar.errors import require
from continuar.evaluation.images import Images
from continuar.evaluation.networks import sha256_of_state
from continuar.generation.engines import EngineName, chosen
from continuar.generation.plan import make_plan
from continuar.generation.weights import Precision
from continuar.pipeline import Pipeline


class Samples(ABC):
    """Images of one size by index, whoever makes them.

    Attributes:
        count: how many. size: height and width. notes: what a reader of the result should know.
        labels: of each image, and ``classes`` what they mean; None and () where there are none.
    """

    count: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    @abstractmethod
    def make(self, first: int, number: int) -> np.ndarray:
        """The images ``first``, ... ``first + number - 1``, uint8 [n, H, W, 3]; fewer where they end."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides the images, as JSON values."""


class GeneratedSamples(Samples):
    """Image i has the seed ``seed + i`` and shows class i mod classes, whoever makes it and with whom.

    Every call generates as many images as it is asked for, beyond ``count`` too: batches of one shape round alike, and serve
    engines that capture one.

    Args:
        pipe: the model.
        count: a multiple of the number of classes, so that they are balanced.
        seed: of the first image.
        settings: sampling options by name that are not the model's defaults.
        engine, precision: who computes, as `Pipeline.engine` takes it; what "auto" means for the model is what the report names.
        name, weights: what the report calls the model.

    Raises:
        UserError: no images, a count that the classes do not divide, or settings or an engine that the model cannot take.
    """

    def __init__(
        self,
        pipe: Pipeline,
        count: int,
        *,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        name: str = "",
        weights: str = "",
    ) -> None:
        classes = max(1, len(pipe.classes))
        require(count >= 2, f"images is {count}; allowed: 2 or more")
        less = count - count % classes
        near = f"{less} or {less + classes}" if less else f"{classes}"
        require(count % classes == 0, f"images is {count}, which {classes} classes do not divide; take {near}")
        options = pipe.defaults.override(**dict(settings or {}))
        make_plan(pipe.model.order, options, pipe.model.order.positions)  # refuses steps that the model cannot take
        self._pipe, self._seed, self._settings = pipe, seed, options.to_dict()
        pipe.engine(engine, precision)  # refuses what cannot run the model
        self._running = {"engine": chosen(pipe.model, engine), "precision": precision}
        self._name, self._weights = name, weights
        side = int(pipe.tokenizer.config.image_size)
        self.count, self.size, self.classes = count, (side, side), pipe.classes
        self.labels = np.arange(count) % classes if pipe.classes else None

    def make(self, first: int, number: int) -> np.ndarray:
        index = range(first, first + number)
        labels = [i % len(self.classes) for i in index] if self.classes else None
        seeds = [self._seed + i for i in index]
        return self._pipe(labels, seeds, batch_size=number, **self._running, **self._settings)[: self.count - first]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "generated",
            "model": self._name,
            "weights": self._weights,
            "model_sha256": sha256_of_state(self._pipe.model),
            "tokenizer_sha256": sha256_of_state(self._pipe.tokenizer),
            "model_config": to_json(self._pipe.file.model),
            "tokenizer_config": to_json(self._pipe.tokenizer.config),
            "settings": {**self._settings, **self._running},
            "seed": self._seed,
            "images": self.count,
            "size": list(self.size),
            "classes": len(self.classes),
        }


class GivenSamples(Samples):
    """Anyone's images."""

    def __init__(self, images: Images) -> None:
        require(len(images) >= 2, f"{images.name} has {len(images)} images; at least 2 are needed")
        self._images, self.count, self.size, self.notes = images, len(images), images.size, images.notes

    def make(self, first: int, number: int) -> np.ndarray:
        return self._images.read(first, min(first + number, self.count))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "given",
            "path": self._images.name,
            "identity": self._images.identity(),
            "images": self.count,
            "size": list(self.size),
        }
