"""Images per second, peak memory and share of the bf16 peak of the training step.

    python benchmarks/training.py --recipes cifar10 --engines eager,graphs --out benchmarks/results/training.json

Random tokens of the recipe's shape, already on the device, so that the step alone is measured; the model FLOPs are those of
`continuar train RECIPE --dry-run`. The peak is an 8192^3 bf16 matrix product on random data, measured in the same run.

Memory is what tensors had in use at most, and what the allocator held at most. Engines with CUDA graphs use their activations
while they warm up and capture, before the optimizer has moments, and then only hold them: there the second number is what it takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from kernel_times import kernel_table

from continuar.distributed import expandable_segments, pick_device
from continuar.recipes import RECIPES, find_recipe
from continuar.sampling.speed import matmul_peak
from continuar.training.config import Run
from continuar.training.estimate import training_flops
from continuar.training.step import TrainStep

PROFILED = 5
"""Steps over which --profile looks."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Run, device: torch.device, steps: int, profile: bool = False) -> dict[str, float]:
    """One run's step: warm-up over every number of masked tokens, then ``steps`` timed steps in two halves."""
    config = run.model_config(run.data.classes or 10)
    torch.manual_seed(0)
    with torch.device(device):
        model = config.build()
    trainer = TrainStep(model, run)
    batch = run.train.batch_size
    tokens = torch.randn(batch, config.tokens.seq_len, config.tokens.dim, device=device)
    labels = torch.randint(config.classes, (batch,), device=device)

    def stream(step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens[: batch // run.train.micro_batches], labels[: batch // run.train.micro_batches]

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    seen: set[int] = set()
    step = 0
    wanted = set(model.num_masked_distribution()) if run.train.engine != "eager" else set()
    while step < 3 or (wanted - seen and step < 400):
        trainer.seed(step)
        seen.add(model.sample_num_masked())
        trainer(step, stream)
        step += 1
    synchronize(device)
    warmup = time.perf_counter() - began
    halves = []
    for _ in range(2):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(steps // 2):
            trainer(step, stream)
            step += 1
        synchronize(device)
        halves.append((time.perf_counter() - began) / (steps // 2))
    averages = trainer.meter.read()
    if profile:
        steps = range(PROFILED)
        print(kernel_table(lambda: [trainer(step, stream) for step in steps], PROFILED, "step"))
    seconds = sum(halves) / 2
    return {
        "images_per_second": batch / seconds,
        "milliseconds_per_step": 1e3 * seconds,
        "spread": abs(halves[0] - halves[1]) / seconds,
        "model_tflops_per_second": training_flops(config) * batch / seconds / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan"),
        "held_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else float("nan"),
        "warmup_seconds": warmup,
        "loss": averages.means["loss"],
        "skipped_steps": averages.skipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipes", default="cifar10")
    parser.add_argument("--engines", default="eager", help="values of train.engine")
    parser.add_argument("--batch-size", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--granularity", type=int, default=0, help="backbone.mask_granularity; 0: the recipe's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take the time (CUDA)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    expandable_segments()
    device = pick_device(options.device)
    peak = matmul_peak(device) if device.type == "cuda" else float("nan")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16 8192^3 product {peak / 1e12:.0f} TFLOP/s")
    results = []
    for recipe in options.recipes.split(","):
        run = find_recipe(recipe, RECIPES)()
        batch = options.batch_size or run.train.batch_size
        backbone = dataclasses.replace(run.backbone, mask_granularity=options.granularity or run.backbone.mask_granularity)
        for engine in options.engines.split(","):
            train = dataclasses.replace(run.train, batch_size=batch, engine=engine)
            result = measure(dataclasses.replace(run, train=train, backbone=backbone), device, options.steps, options.profile)
            share = result["model_tflops_per_second"] * 1e12 / peak
            results.append({"recipe": recipe, "engine": engine, "batch_size": batch, "share_of_peak": share, **result})
            print(
                f"{recipe:<28} batch {batch:<5} {engine:<8} {result['images_per_second']:>9,.0f} images/s "
                f"{result['milliseconds_per_step']:8.2f} ms/step ±{result['spread']:.1%}  {share:6.1%} of peak "
                f"{result['peak_memory_gib']:6.2f} GiB used, {result['held_memory_gib']:.2f} held  "
                f"warm-up {result['warmup_seconds']:.0f} s",
                flush=True,
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        header = {"device": name, "torch": torch.__version__, "matmul_tflops": peak / 1e12}
        options.out.write_text(json.dumps({**header, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
