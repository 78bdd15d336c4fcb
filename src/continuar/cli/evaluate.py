"""``continuar evaluate MODEL --reference R`` and ``continuar evaluate --images-from DIR --reference R``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from continuar.cli.common import (
    Autoencoder,
    Device,
    NetworkOptions,
    RunWeights,
    SamplingSettings,
    load_pipeline,
    local_device,
    progress_bars,
)
from continuar.distributed import joined
from continuar.errors import require
from continuar.evaluation.run import RESULT, EvaluationOptions, evaluate
from continuar.evaluation.samples import GeneratedSamples, Samples, open_images
from continuar.pipeline import Pipeline, Weights


@dataclass(frozen=True)
class ScoringOptions:
    """Options of `continuar evaluate` and `continuar sweep`."""

    reference: str = ""
    """Real images to score against: an .npz file of `continuar stats` or of ADM's suite, a folder of images, Parquet or tars."""
    features: Annotated[NetworkOptions, tyro.conf.arg(name="")] = field(default_factory=NetworkOptions)
    seed: int = 0
    """Seed of the first image."""
    weights: RunWeights = "ema"
    tokenizer: Autoencoder = None
    settings: Annotated[SamplingSettings, tyro.conf.arg(name="")] = field(default_factory=SamplingSettings)
    device: Device = "auto"

    def load(self, model: str, weights: Weights) -> Pipeline:
        """Loads a model on this process's device."""
        return load_pipeline(model, self.tokenizer, weights=weights, device=local_device(self.device))


@dataclass(frozen=True)
class Options(ScoringOptions):
    """Options of `continuar evaluate`."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")] = ""
    """A run directory, a saved model, a shipped name, or an official MAR checkpoint file."""
    images_from: Path | None = None
    """Images to score instead of a model's: a folder, Parquet or tars, or an .npz file with arr_0."""
    images: int = 50_000
    """Images to generate, a multiple of the number of classes."""
    options: Annotated[EvaluationOptions, tyro.conf.arg(name="")] = field(default_factory=EvaluationOptions)
    out: Path = Path("evaluation")
    """The directory to write to: result.json, samples.png, and the features of finished batches."""


def run(options: Options) -> None:
    """Score the images of a model, or images on disk, against real ones.

    The scores are the Frechet distance (FID with the FID Inception weights), inception score, kernel distance, precision, recall,
    density and coverage. Image i has the seed SEED + i and shows class i mod classes. Under torchrun the processes share the work.
    The same command continues an interrupted evaluation.
    """
    require(bool(options.reference), "--reference is missing: what should the images be scored against?")
    with joined() as group, progress_bars(shown=group.first) as bar:
        network = options.features.load(local_device(options.device))
        samples = _samples(options)
        report = evaluate(samples, options.reference, network, options.out, options=options.options, group=group, bar=bar)
    if report is not None:
        print(f"{report.table()}written  {options.out / RESULT}")


def _samples(options: Options) -> Samples:
    given = options.settings.given()
    if options.images_from is not None:
        require(not options.model, f"--images-from is given, and the model '{options.model}'; allowed: one of them")
        running, usual = options.settings.running(), SamplingSettings().running()
        named = [*given, *(name for name, value in running.items() if value != usual[name])]
        require(not named, f"--images-from is given, and sampling settings ({', '.join(named)}); those are for a model")
        return open_images(options.images_from)
    require(bool(options.model), "neither a model nor --images-from is given; allowed: one of them")
    return GeneratedSamples(
        options.load(options.model, options.weights),
        options.images,
        seed=options.seed,
        settings=given,
        engine=options.settings.engine,
        precision=options.settings.precision,
        name=options.model,
        weights=options.weights,
    )
