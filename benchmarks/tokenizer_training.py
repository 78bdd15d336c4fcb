"""Images per second of the step that trains a tokenizer, before and after its discriminator has joined.

    python benchmarks/tokenizer_training.py --recipes kl16_imagenette128 --engines compile,compile-graphs \
        --perceptual-weights squeezenet1_1.safetensors --out benchmarks/results/tokenizer_training.json

Random images that are on the device already, so that the step alone is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from pathlib import Path

import torch
from kernel_times import kernel_table

from continuar.distributed import pick_device
from continuar.recipes import TOKENIZER_RECIPES, find_recipe
from continuar.training.autoencoder import TokenizerStep
from continuar.training.config import TokenizerRun
from continuar.training.gan_losses import build_perceptual

WARMUP_STEPS = 6
PROFILED = 3
"""Steps over which --profile looks."""


def measure(
    run: TokenizerRun, device: torch.device, steps: int, with_discriminator: bool, profile: bool
) -> dict[str, float | bool | None]:
    """Warm-up, then ``steps`` timed steps in two halves."""
    cuda = device.type == "cuda"
    run = dataclasses.replace(
        run, discriminator=dataclasses.replace(run.discriminator, start_images=0 if with_discriminator else 10**12)
    )
    torch.compiler.reset()
    torch.manual_seed(0)
    trainer = TokenizerStep(run.tokenizer.build().to(device), run, build_perceptual(run.loss, device))
    side, batch = run.tokenizer.image_size, run.train.batch_size
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1

    def take(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            trainer.seed(0)
            trainer(10, images)
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    warmup = take(WARMUP_STEPS)
    halves = [take(steps // 2) / (steps // 2) for _ in range(2)]
    if profile:
        print(kernel_table(lambda: take(PROFILED), PROFILED, "step"))
    seconds = sum(halves) / 2
    return {
        "judged": with_discriminator,
        "batch_size": batch,
        "images_per_second": batch / seconds,
        "milliseconds_per_step": 1e3 * seconds,
        "spread": abs(halves[0] - halves[1]) / seconds,
        "held_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30 if cuda else None,
        "warmup_seconds": warmup,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipes", default="kl_cifar10")
    parser.add_argument("--engines", default="eager", help="values of train.engine")
    parser.add_argument("--perceptual-weights", default="", help="file of the perceptual network; none: without that term")
    parser.add_argument("--batch-size", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take the time (CUDA)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    results = []
    for recipe in options.recipes.split(","):
        run = find_recipe(recipe, TOKENIZER_RECIPES)()
        weights = options.perceptual_weights
        loss = dataclasses.replace(run.loss, perceptual_weights=weights, **({} if weights else {"perceptual": "off"}))
        for engine in options.engines.split(","):
            train = dataclasses.replace(run.train, batch_size=options.batch_size or run.train.batch_size, engine=engine)
            for with_discriminator in (False, True):
                result = measure(
                    dataclasses.replace(run, loss=loss, train=train), device, options.steps, with_discriminator, options.profile
                )
                results.append({"recipe": recipe, "engine": engine, "perceptual": bool(weights), **result})
                print(
                    f"{recipe:<20} {engine:<15} {'with' if with_discriminator else 'without'} discriminator "
                    f"{result['images_per_second']:>8,.0f} images/s {result['milliseconds_per_step']:8.2f} ms/step "
                    f"±{result['spread']:.1%}  {result['held_memory_gib'] or 0:.2f} GiB  warm-up {result['warmup_seconds']:.0f} s",
                    flush=True,
                )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"device": name, "torch": torch.__version__, "results": results}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
