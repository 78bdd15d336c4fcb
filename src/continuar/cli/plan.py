"""``continuar plan RECIPE``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from continuar.cli.common import RecipeOptions, at_least
from continuar.distributed import GIB, Kind
from continuar.recipes import RECIPES
from continuar.training.config import BaseRun
from continuar.training.estimate import HEADROOM, Machine, Plan, estimate_run

_KINDS: tuple[Kind, ...] = ("ddp", "fsdp")


@dataclass(frozen=True)
class Options(RecipeOptions):
    """Options of `continuar plan` besides the recipe's own fields."""

    recipes = RECIPES

    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    dataset_images: int = 0
    """Number of images in the data set, for its size; 0: unknown."""


def run(options: Options) -> None:
    """Estimate what training a recipe costs on N GPUs: memory by part under DDP and FSDP, days, network traffic, disk space.

    Nothing is trained or allocated.

    continuar plan RECIPE [--gpus N] [options]
    continuar plan RECIPE --help   every option, and every field of the recipe
    """
    at_least(0, dataset_images=options.dataset_images)
    # The number of classes changes the size of one small embedding only.
    plan = estimate_run(options.run, options.run.data.classes or 1, options.machine)
    print(report(options.run, options.machine, plan, options.dataset_images), end="")


def report(run: BaseRun, machine: Machine, plan: Plan, dataset_images: int) -> str:
    """The estimate as text."""
    loop, gpus = run.train, machine.gpus
    machines = f"{gpus} GPUs" if gpus > 1 else "1 GPU"
    recomputed = ", blocks once more forward" if loop.activation_checkpointing else ""
    accumulated = f", {plan.accumulated} one after another" if plan.accumulated > 1 else ""
    lines = [
        f"parameters       {plan.parameters / 1e6:,.2f} M",
        f"FLOPs per image  {plan.flops_per_image / 1e9:,.3g} GFLOP, forward and backward{recomputed} at the mean mask ratio",
        f"batch            {loop.batch_size} images on {machines}: micro-batches of {plan.micro_batch}{accumulated}",
        f"duration         {loop.steps:,} steps, {plan.days:,.3g} days at {machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s",
        _data(plan, dataset_images),
        "",
        f"{'GiB per GPU':<32}" + "".join(f"{kind:>10}" for kind in _KINDS),
    ]
    memory = [plan.memory[kind] for kind in _KINDS]
    rows = {name: [m.parts.get(name, 0.0) for m in memory] for name in memory[0].parts}
    rows[f"activations of {plan.micro_batch} images"] = [m.per_image * plan.micro_batch for m in memory]
    rows["total"] = [m.total(plan.micro_batch) for m in memory]
    rows["sent per step, and received"] = [plan.network[kind] for kind in _KINDS]
    lines += [f"  {name:<30}" + "".join(f"{value / GIB:>10.2f}" for value in values) for name, values in rows.items()]
    if loop.engine.startswith("compile"):
        lines += ["", "activations are those of the uncompiled step; compiled ones need less"]
    lines += [""] + [_advice(kind, plan, machine, loop.batch_size // gpus) for kind in _KINDS]
    return "\n".join(lines) + "\n"


def _data(plan: Plan, images: int) -> str:
    what = "a cache of latents on disk" if plan.cached else "pixels, in the memory of every GPU"
    total = f", {plan.data_per_image * images / GIB:,.3g} GiB for {images:,} images" if images else ""
    return f"data             {plan.data_per_image:,} bytes per image{total} ({what})"


def _advice(kind: Kind, plan: Plan, machine: Machine, share: int) -> str:
    capacity = f"{HEADROOM:.0%} of {machine.gpu_memory:g} GiB"
    fits = plan.memory[kind].fits(machine.gpu_memory, share)
    if plan.memory[kind].total(plan.micro_batch) <= HEADROOM * machine.gpu_memory * GIB:
        return f"{kind:<6} fits into {capacity}"
    if fits:
        return f"{kind:<6} does not fit into {capacity}; it does with --train.micro-batch {fits}"
    return f"{kind:<6} does not fit into {capacity}, not even one image at a time"
