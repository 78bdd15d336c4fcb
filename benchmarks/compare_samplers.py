"""Frechet distances of SqueezeNet features of a model's samples by several samplers, same seeds and labels, few enough for a CPU.

    python benchmarks/compare_samplers.py cifar10 --real cifar10-test.parquet --squeezenet squeezenet1_1_imagenet.safetensors \
        --samplers dpmpp_2m:15 dpmpp_2m_sde:15

With so few images all distances are too large, by as much as real images' own distance, which is printed too: compare them with one
another only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from continuar.data.loader import load_images
from continuar.distributed import pick_device
from continuar.evaluation.metrics import frechet_distance
from continuar.evaluation.networks import SqueezeNet, extract
from continuar.pipeline import Pipeline
from continuar.statistics import moments


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--real", type=Path, required=True, help="images to compare with")
    parser.add_argument("--squeezenet", type=Path, required=True)
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m:15", "dpmpp_2m_sde:15"], help="NAME:STEPS")
    parser.add_argument("--images", type=int, default=500, help="samples of each sampler; every class equally often")
    parser.add_argument("--real-images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    pipe = Pipeline.from_pretrained(options.model, device=str(device))
    network = SqueezeNet.from_file(options.squeezenet).eval()

    def features(images: np.ndarray) -> np.ndarray:
        return extract(network, images, device=device, batch_size=options.batch_size)

    real = features(load_images(options.real, size=pipe.tokenizer.config.image_size).images[: options.real_images])
    reference, few = moments(real), min(options.images, len(real) // 2)
    own = frechet_distance(moments(real[:few]), moments(real[few:]))
    print(f"{few} real images to the other {len(real) - few}: {own:.0f}", flush=True)
    for sampler in options.samplers:
        name, steps = sampler.split(":")
        began, parts = time.perf_counter(), []
        with torch.inference_mode():
            for first in range(0, options.images, options.batch_size):
                seeds = list(range(first, min(first + options.batch_size, options.images)))
                labels = [seed % len(pipe.config.classes) for seed in seeds]
                parts.append(pipe(labels, seeds, sampler=name, diffusion_steps=int(steps), batch_size=options.batch_size))
        seconds = (time.perf_counter() - began) / options.images
        distance = frechet_distance(moments(features(np.concatenate(parts))), reference)
        print(f"{name:<10} {steps:>4} steps  distance {distance:.0f}  {seconds:.3f} s/image", flush=True)


if __name__ == "__main__":
    main()
