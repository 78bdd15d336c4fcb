"""``continuar tokenizer train RECIPE``."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from continuar.cli.common import parse, progress_bars, split_recipe
from continuar.config import to_json
from continuar.devices import pick_device
from continuar.distributed import joined, local_device, processes
from continuar.recipes.tokenizers import TOKENIZER_RECIPES, find_tokenizer_recipe
from continuar.training.autoencoder import train_tokenizer
from continuar.training.config import TokenizerRun

_HELP = """usage: continuar tokenizer train RECIPE [options]
       torchrun --nproc-per-node N -m continuar tokenizer train RECIPE [options]     on N GPUs or processes
       continuar tokenizer train --list          recipes, one line each
       continuar tokenizer train RECIPE --help   every field of the recipe, with its value there
       continuar tokenizer train RECIPE --dry-run
"""


@dataclass(frozen=True)
class Arguments:
    """Options beside the recipe's own fields."""

    run: Annotated[TokenizerRun, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run directory; runs/RECIPE if not given."""
    resume: bool = False
    """Continue the run in that directory exactly where its newest intact checkpoint stands."""
    force: bool = False
    """Resume although the config differs from the one the run began with."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dry_run: bool = False
    """Print the resolved config, parameters and tokens, and stop."""


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    chosen = split_recipe(arguments, "continuar tokenizer train", _HELP, TOKENIZER_RECIPES)
    if chosen is None:
        return 0
    name, rest = chosen
    recipe = find_tokenizer_recipe(name)
    description = inspect.getdoc(recipe) or ""
    prog = f"continuar tokenizer train {name}"
    options = parse(Arguments, rest, prog=prog, description=description, default=Arguments(recipe()))
    if options.dry_run:
        print(dry_run(options.run), end="")
        return 0
    directory = options.out or Path("runs") / name
    device = pick_device(options.device)
    device = local_device(device) if processes() else device
    with joined("ddp", device) as parallel, progress_bars(parallel.first) as bar:
        on_step = bar("training")
        train_tokenizer(
            options.run,
            directory,
            device=device,
            resume=options.resume,
            force=options.force,
            on_report=lambda report: on_step(report.step, report.steps),
            on_read=bar("reading images"),
            parallel=parallel,
        )
    kept = directory / "tokenizer"
    if parallel.first:
        print(f"trained: {kept}  (continuar tokenizer evaluate {kept} DATA; continuar cache DATA {kept} DST)")
    return 0


def dry_run(run: TokenizerRun) -> str:
    """The resolved config and its sizes; nothing is allocated."""
    with torch.device("meta"):
        network = run.tokenizer.network.build()
    spec = run.tokenizer.spec
    tokens = f"of dim {spec.dim}" if spec.kind == "vector" else f"of {spec.vocabulary} ids"
    lines = [
        json.dumps(to_json(run), indent=2),
        f"parameters        {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M",
        f"tokens per image  {spec.seq_len} ({spec.grid[0]} x {spec.grid[1]}) {tokens}",
        f"training          {run.train.steps:,} steps of {run.train.batch_size} images",
    ]
    return "\n".join(lines) + "\n"
