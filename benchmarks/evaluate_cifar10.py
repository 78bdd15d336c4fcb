"""Measures CIFAR-10 models: SqueezeNet Frechet distance, class accuracy, nearest training images.

    python benchmarks/evaluate_cifar10.py cifar10 --train cifar10-train.parquet --test cifar10-test.parquet \
        --squeezenet squeezenet1_1_imagenet.safetensors --classifier out/classifier --out out/evaluation

Image i shows class i mod 10 and has seed i. The distance is that of the samples to all training images; beside it stands that of as
many real test images, which a perfect model would reach. Accuracy is the classifier's, over all samples and over the first 1,000.
Every MODEL is measured at every --guidance; of the first combination come grid.png (10 x 10) and neighbours.png (16 samples, each
followed by its 4 nearest training images). result.json holds every row.
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
from continuar.data.images import ImageSet, load_images
from continuar.devices import pick_device
from continuar.evaluation.classifier import Classifier, class_accuracy
from continuar.evaluation.features import SqueezeNet, extract
from continuar.evaluation.moments import Moments, frechet_distance, moments
from continuar.evaluation.neighbours import nearest_neighbours
from continuar.pictures import grid, save_png


@dataclass(frozen=True)
class Reference:
    """What samples are held against."""

    train: ImageSet
    train_features: np.ndarray
    train_moments: Moments
    test_features: np.ndarray
    network: SqueezeNet
    judge: Classifier
    judge_on_test: float
    device: torch.device


def read_reference(options: argparse.Namespace, device: torch.device) -> Reference:
    """Features of the real images, and what the classifier makes of them."""
    train, test = (load_images(path, size=32) for path in (options.train, options.test))
    limit = options.limit or None
    train, test = train.take(limit), test.take(limit)
    network, judge = SqueezeNet.from_file(options.squeezenet, device), Classifier.load(options.classifier, device)
    features = extract(network, train.images, device=device)
    return Reference(
        train=train,
        train_features=features,
        train_moments=moments(features),
        test_features=extract(network, test.images, device=device),
        network=network,
        judge=judge,
        judge_on_test=class_accuracy(judge.predict(test.images), test.labels),
        device=device,
    )


def measure(options: argparse.Namespace, reference: Reference) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """(row, images, features) of each combination."""
    for model in options.models:
        pipe = continuar.load(model, weights=options.weights, device=reference.device)
        for guidance in options.guidance or [pipe.defaults.guidance]:
            settings = pipe.defaults.override(
                guidance=guidance,
                guidance_schedule=options.guidance_schedule,
                steps=options.steps,
                diffusion_steps=options.diffusion_steps,
                temperature=options.temperature,
            )
            labels = np.arange(options.samples) % len(pipe.classes)
            began = time.perf_counter()
            images = pipe(labels.tolist(), 0, **settings.to_dict(), batch_size=options.batch_size)
            seconds = time.perf_counter() - began
            features = extract(reference.network, images, device=reference.device)
            predicted, first = reference.judge.predict(images), min(1000, options.samples)
            row = {
                "model": model,
                "weights": options.weights,
                **settings.to_dict(),
                "samples": options.samples,
                "squeezenet_frechet_distance": frechet_distance(moments(features), reference.train_moments),
                "class_accuracy": class_accuracy(predicted, labels),
                "class_accuracy_of_first_1000": class_accuracy(predicted[:first], labels[:first]),
                "images_per_second": options.samples / seconds,
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
    parser.add_argument("--guidance", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--guidance-schedule", choices=("linear", "constant"), help="default: the model's")
    for name, kind in (("steps", int), ("diffusion-steps", int), ("temperature", float)):
        parser.add_argument(f"--{name}", type=kind, help="default: the model's")
    parser.add_argument("--tf32", action="store_true", help="sample with TF32 matrix products (NVIDIA GPUs; faster, slightly off)")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    reference = read_reference(options, pick_device(options.device))
    header = {
        "training_images": len(reference.train),
        "squeezenet_frechet_distance_of_as_many_test_images": frechet_distance(
            moments(reference.test_features[: options.samples]), reference.train_moments
        ),
        "class_accuracy_of_test_images": reference.judge_on_test,
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
    """grid.png and neighbours.png."""
    classes = reference.train.classes
    per_class = min(10, len(images) // len(classes))
    order = [c + len(classes) * i for c in range(len(classes)) for i in range(per_class)]
    save_png(grid(images[order], [classes[i % len(classes)] for i in order], columns=per_class), out / "grid.png")
    _, nearest = nearest_neighbours(features[:16], reference.train_features, k=4)
    rows = np.concatenate([np.concatenate([images[i : i + 1], reference.train.images[found]]) for i, found in enumerate(nearest)])
    captions = ["sample", "nearest training images", *["nearest training images"] * 3] * len(nearest)
    save_png(grid(rows, captions, columns=5), out / "neighbours.png")


if __name__ == "__main__":
    main()
