"""Measures CIFAR-10 models over guidances: scores in SqueezeNet features, class accuracy, nearest training images.

    python benchmarks/evaluate_cifar10.py cifar10 --train cifar10-train.parquet --test cifar10-test.parquet \
        --squeezenet squeezenet1_1_imagenet.safetensors --classifier out/classifier --out out/evaluation

Image i shows class i mod 10 and has seed i. The distance is that of the samples to all training images; beside it stands that of as
many real test images, which a perfect model would reach; the other scores are against 10,000 training images. Accuracy is the
classifier's, over all samples and over the first 1,000. Every MODEL is measured at each --guidance-scale; the first combination
gives grid.png (10 x 10) and neighbours.png (16 samples, each followed by its 4 nearest training images with their distances).
result.json holds every row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import continuar
from continuar.data.loader import ImageSet, load_images
from continuar.diffusion.samplers import SAMPLERS
from continuar.distributed import pick_device
from continuar.evaluation.metrics import class_accuracy, frechet_distance, nearest_neighbours, neighbours_picture
from continuar.evaluation.networks import Classifier, Extracted, SqueezeNet, extract, sha256_of_file
from continuar.evaluation.reference import REFERENCE_IMAGES, Statistics, reference_indices, score_samples
from continuar.evaluation.samples import GeneratedSamples
from continuar.pictures import grid, save_png
from continuar.pipeline import ENGINE_NAMES
from continuar.sampling.fast.weights import DTYPES
from continuar.statistics import moments

OPTIONAL = ("guidance_schedule", "steps", "sampler", "diffusion_steps", "temperature")
"""Settings that default to the model's own."""


@dataclass(frozen=True)
class Reference:
    """The real images that samples are compared with, and the networks."""

    train: ImageSet
    train_features: np.ndarray
    statistics: Statistics
    test_features: np.ndarray
    network: SqueezeNet
    classifier: Classifier
    accuracy_on_test: float
    device: torch.device


def read_reference(options: argparse.Namespace, device: torch.device) -> Reference:
    """Reads the real images and extracts their features."""
    train, test = (load_images(path, size=32).take(options.limit or None) for path in (options.train, options.test))
    network, classifier = SqueezeNet.from_file(options.squeezenet, device), Classifier.load(options.classifier, device)
    features = extract(network, train.images, device=device)
    kept, sha256 = features[reference_indices(len(train), REFERENCE_IMAGES)], sha256_of_file(Path(options.squeezenet))
    return Reference(
        train=train,
        train_features=features,
        statistics=Statistics(moments(features), "squeezenet", sha256, (32, 32), kept, source=options.train),
        test_features=extract(network, test.images, device=device),
        network=network,
        classifier=classifier,
        accuracy_on_test=class_accuracy(classifier.predict(test.images), test.labels),
        device=device,
    )


def measure(options: argparse.Namespace, reference: Reference) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Yields (row, images, features) of each combination."""
    given = {name: getattr(options, name) for name in OPTIONAL if getattr(options, name) is not None}
    size = min(options.batch_size, options.samples)
    for model in options.models:
        pipe = continuar.load(model, weights=options.weights, device=reference.device)
        for guidance in options.guidance_scale or [pipe.defaults.guidance_scale]:
            settings = {"guidance_scale": guidance, **given}
            samples = GeneratedSamples(pipe, options.samples, settings=settings, engine=options.engine, precision=options.precision)
            began = time.perf_counter()
            images = np.concatenate([samples.make(first, size) for first in range(0, samples.count, size)])
            seconds = time.perf_counter() - began
            features = extract(reference.network, images, device=reference.device)
            scores = score_samples(Extracted(features, None), reference.statistics, device=reference.device)
            predicted, first = reference.classifier.predict(images), min(1000, samples.count)
            assert samples.labels is not None
            row = {
                "model": model,
                "weights": options.weights,
                **samples.describe()["settings"],
                "samples": samples.count,
                **{f"squeezenet_{name}": value for name, value in scores.values.items()},
                "class_accuracy": class_accuracy(predicted, samples.labels),
                "class_accuracy_of_first_1000": class_accuracy(predicted[:first], samples.labels[:first]),
                "images_per_second": samples.count / seconds,
            }
            yield row, images, features


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    for name in ("train", "test", "squeezenet", "classifier"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=2500)
    parser.add_argument("--limit", type=int, default=0, help="use only so many real images of each kind; 0: all")
    parser.add_argument("--weights", default="ema", choices=("ema", "raw"))
    parser.add_argument("--guidance-scale", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--guidance-schedule", choices=("linear", "constant"), help="default: the model's")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="default: the model's")
    for name, kind in (("steps", int), ("diffusion-steps", int), ("temperature", float)):
        parser.add_argument(f"--{name}", type=kind, help="default: the model's")
    parser.add_argument("--engine", choices=ENGINE_NAMES, default="auto", help="what generates")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="float32", help="of the fast engine's matrix products")
    parser.add_argument("--tf32", action="store_true", help="sample with TF32 matrix products (NVIDIA GPUs; faster, slightly off)")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if min(options.samples, options.batch_size) < 1:
        parser.error(f"--samples is {options.samples}, --batch-size {options.batch_size}; allowed: 1 or more")
    reference = read_reference(options, pick_device(options.device))
    header = {
        "training_images": len(reference.train),
        "squeezenet_frechet_distance_of_as_many_test_images": frechet_distance(
            moments(reference.test_features[: options.samples]), reference.statistics.moments
        ),
        "class_accuracy_of_test_images": reference.accuracy_on_test,
        "tf32": options.tf32,
    }
    print(json.dumps(header), flush=True)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row, images, features in measure(options, reference):
        rows.append(row)
        print(json.dumps(row), flush=True)
        (options.out / "result.json").write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n", encoding="utf-8")
        if len(rows) == 1:
            draw(options.out, images, features, reference)


def draw(out: Path, images: np.ndarray, features: np.ndarray, reference: Reference) -> None:
    """Writes grid.png and neighbours.png."""
    classes = reference.train.classes
    per_class = min(10, len(images) // len(classes))
    order = [c + len(classes) * i for c in range(len(classes)) for i in range(per_class)]
    save_png(grid(images[order], [classes[i % len(classes)] for i in order], columns=per_class), out / "grid.png")
    distances, nearest = nearest_neighbours(features[:16], reference.train_features, k=4)
    save_png(neighbours_picture(images[:16], reference.train.images[nearest], distances), out / "neighbours.png")


if __name__ == "__main__":
    main()
