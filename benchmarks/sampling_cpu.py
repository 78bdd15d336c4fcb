"""Seconds for images on a CPU, over autoregressive and diffusion steps: what the defaults of a shipped model may cost.

    OMP_NUM_THREADS=2 python benchmarks/sampling_cpu.py --recipe cifar10 --images 20 --steps 8 16 32 --diffusion-steps 10 25 50 100

Untrained weights: the time does not depend on what they are. Loading is not counted. Guidance other than 1 doubles the rows. In
brackets stand the seconds of all cores together, which say more where others compute as well.
"""

from __future__ import annotations

import argparse
import time

import torch
from shipping.planning import override

from continuar.checkpoints.store import ModelFile
from continuar.pipeline import Pipeline
from continuar.recipes import find_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--diffusion-steps", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    run = override(find_recipe(options.recipe)(), ["tokenizer.std=0.5"])  # measured on data in training
    classes = run.data.classes or 10
    torch.manual_seed(0)
    model = run.model_config(classes).build()
    pipe = Pipeline(ModelFile(model.config, run.tokenizer, tuple(str(i) for i in range(classes)), run.sampling), model)
    labels = [i % classes for i in range(options.images)]
    pipe(labels[:2], 0, steps=2, diffusion_steps=2)  # allocations and thread pools are made once
    print(f"{options.recipe}, {options.images} images, guidance {options.guidance}, {torch.get_num_threads()} threads, seconds")
    print("steps \\ diffusion" + "".join(f"{d:>16}" for d in options.diffusion_steps))
    for steps in options.steps:
        print(f"{steps:>17}", end="", flush=True)
        for diffusion_steps in options.diffusion_steps:
            began, computed = time.perf_counter(), time.process_time()
            pipe(
                labels,
                0,
                steps=steps,
                diffusion_steps=diffusion_steps,
                guidance=options.guidance,
                batch_size=options.batch_size,
            )
            busy = f"({time.process_time() - computed:.1f})"
            print(f"{time.perf_counter() - began:>8.1f}{busy:>8}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
