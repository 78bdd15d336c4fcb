"""Seconds for images on a CPU, over autoregressive and diffusion steps: what the defaults of a shipped model may cost.

    OMP_NUM_THREADS=2 python benchmarks/sampling_cpu.py --recipe cifar10 --images 20 --steps 8 16 32 --diffusion-steps 10 25 50 100
    OMP_NUM_THREADS=2 python benchmarks/sampling_cpu.py --compare 1 4 16 --steps 32 --diffusion-steps 50

The second command sets the eager engine against the fast one, by turns, at these numbers of images.
Untrained weights: the time does not depend on what they are. Loading is not counted. Guidance other than 1 doubles the rows. In
brackets stand the seconds of all cores together, which say more where others compute as well.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch

from continuar.checkpoints.store import PipelineConfig
from continuar.pipeline import Pipeline
from continuar.recipes import RECIPES, find_recipe


def compare(pipe: Pipeline, labels: list[int], repeats: int, settings: dict[str, Any]) -> None:
    """One line: the fastest run of each engine, by turns, and how far their tokens are apart."""
    options, names = pipe.defaults.override(**settings), ("eager", "fast")
    fastest = {name: (float("inf"), float("inf")) for name in names}
    tokens = {}
    for name in names:
        pipe.tokens(labels, 0, options=options.override(steps=2, diffusion_steps=2), engine=name)
    for _ in range(repeats):
        for name in names:
            began, computed = time.perf_counter(), time.process_time()
            tokens[name] = pipe.tokens(labels, 0, options=options, batch_size=len(labels), engine=name)
            spent = time.perf_counter() - began, time.process_time() - computed
            fastest[name] = min(fastest[name][0], spent[0]), min(fastest[name][1], spent[1])
    (slow, slow_busy), (fast, fast_busy) = (fastest[name] for name in names)
    away = (tokens["eager"] - tokens["fast"]).abs().max().item()
    print(
        f"{len(labels):>4} images  eager {slow:7.2f} s ({slow_busy:.2f})  graphs {fast:7.2f} s ({fast_busy:.2f})  "
        f"{slow / fast:.2f} times as fast ({slow_busy / fast_busy:.2f})  tokens differ by {away:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--diffusion-steps", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--compare", type=int, nargs="+", help="numbers of images at which to compare the engines")
    parser.add_argument("--repeats", type=int, default=2, help="of each engine, with --compare")
    options = parser.parse_args()
    run = find_recipe(options.recipe, RECIPES)()
    run = replace(run, tokenizer=replace(run.tokenizer, std=0.5))  # training measures it on the data
    classes = run.data.classes or 10
    torch.manual_seed(0)
    model = run.model_config(classes).build()
    pipe = Pipeline(PipelineConfig(model.config, run.tokenizer, tuple(str(i) for i in range(classes)), run.sampling), model)
    if options.compare:
        settings = {
            "steps": options.steps[-1],
            "diffusion_steps": options.diffusion_steps[-1],
            "guidance_scale": options.guidance_scale,
        }
        print(f"{options.recipe}, {settings}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for images in options.compare:
            compare(pipe, [i % classes for i in range(images)], options.repeats, settings)
        return
    labels = [i % classes for i in range(options.images)]
    pipe(labels[:2], 0, steps=2, diffusion_steps=2)  # allocations and thread pools are made once
    print(
        f"{options.recipe}, {options.images} images, guidance {options.guidance_scale}, {torch.get_num_threads()} threads, seconds"
    )
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
                guidance_scale=options.guidance_scale,
                batch_size=options.batch_size,
            )
            busy = f"({time.process_time() - computed:.1f})"
            print(f"{time.perf_counter() - began:>8.1f}{busy:>8}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
