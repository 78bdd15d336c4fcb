"""Measures a CIFAR-10 model: SqueezeNet Frechet distance, class accuracy, nearest training images.

    python benchmarks/evaluate_cifar10.py MODEL --train cifar10-train.parquet --test cifar10-test.parquet \
        --squeezenet squeezenet1_1_imagenet.safetensors --classifier out/classifier --out out/evaluation

Image i shows class i mod 10 and has seed i. The distance is that of the samples to all training images; beside it stands that of as
many real test images, which a perfect model would reach. Accuracy is the classifier's, over all samples and over the first 1,000.
With --cache-features the training images' features stay in --out, named by checksums of images and weights.
Writes result.json, grid.png (10 x 10) and neighbours.png (16 samples, each followed by its 4 nearest training images).
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

import numpy as np

import continuar
from continuar.checkpoints.store import checksum
from continuar.data.images import load_images
from continuar.devices import pick_device
from continuar.evaluation.classifier import Classifier, class_accuracy
from continuar.evaluation.features import SqueezeNet, extract
from continuar.evaluation.moments import frechet_distance, moments
from continuar.evaluation.neighbours import nearest_neighbours
from continuar.pictures import grid, save_png


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    for name in ("test", "squeezenet", "classifier"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--accuracy-samples", type=int, default=1000, help="accuracy is given of the first so many, too")
    parser.add_argument("--batch-size", type=int, default=2500)
    parser.add_argument("--cache-features", action="store_true", help="keep the training images' features in --out")
    parser.add_argument("--limit", type=int, default=0, help="use only so many real images of each kind; 0: all")
    parser.add_argument("--weights", default="ema", choices=("ema", "raw"))
    for name, kind in (("steps", int), ("diffusion-steps", int), ("guidance", float), ("temperature", float)):
        parser.add_argument(f"--{name}", type=kind, help="default: the model's")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)

    pipe = continuar.load(options.model, weights=options.weights, device=device)
    names = ("steps", "diffusion_steps", "guidance", "temperature")
    settings = pipe.defaults.override(**{name: getattr(options, name) for name in names})
    labels = np.arange(options.samples) % len(pipe.classes)
    began = time.perf_counter()
    images = pipe(labels.tolist(), 0, **settings.to_dict(), batch_size=options.batch_size)
    seconds = time.perf_counter() - began

    train, test = load_images(options.train, size=32), load_images(options.test, size=32)
    real, held_out = train.images[: options.limit or None], test.images[: options.limit or None]
    network = SqueezeNet.from_file(options.squeezenet, device)
    features = {n: extract(network, x, device=device) for n, x in (("test", held_out), ("made", images))}
    cached = options.out / f"train-{zlib.crc32(real.tobytes()):08x}-{checksum(Path(options.squeezenet))}.npy"
    features["train"] = np.load(cached) if cached.is_file() else extract(network, real, device=device)
    reference = moments(features["train"])
    if options.cache_features and not cached.is_file():
        temporary = cached.with_suffix(".tmp.npy")
        np.save(temporary, features["train"])
        temporary.replace(cached)
    judge = Classifier.load(options.classifier, device)
    predicted, first = judge.predict(images), min(options.accuracy_samples, options.samples)
    result = {
        "model": options.model,
        "weights": options.weights,
        **settings.to_dict(),
        "samples": options.samples,
        "training_images": len(real),
        "squeezenet_frechet_distance": frechet_distance(moments(features["made"]), reference),
        "of_as_many_real_test_images": frechet_distance(moments(features["test"][: options.samples]), reference),
        "class_accuracy": class_accuracy(predicted, labels),
        f"class_accuracy_of_first_{first}": class_accuracy(predicted[:first], labels[:first]),
        "class_accuracy_of_real_test_images": class_accuracy(judge.predict(held_out), test.labels[: len(held_out)]),
        "images_per_second": options.samples / seconds,
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))

    per_class = min(10, options.samples // len(pipe.classes))
    order = [c + len(pipe.classes) * i for c in range(len(pipe.classes)) for i in range(per_class)]
    save_png(grid(images[order], [pipe.classes[labels[i]] for i in order], columns=per_class), options.out / "grid.png")
    _, nearest = nearest_neighbours(features["made"][:16], features["train"], k=4)
    rows = np.concatenate([np.concatenate([images[i : i + 1], train.images[found]]) for i, found in enumerate(nearest)])
    captions = ["sample", "nearest training images", *["nearest training images"] * 3] * len(nearest)
    save_png(grid(rows, captions, columns=5), options.out / "neighbours.png")


if __name__ == "__main__":
    main()
