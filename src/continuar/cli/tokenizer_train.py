"""``continuar tokenizer train RECIPE``."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from continuar.cli.common import TrainingOptions, progress_bars, tokens_text
from continuar.config import to_json
from continuar.distributed import joined
from continuar.recipes import TOKENIZER_RECIPES
from continuar.training.autoencoder import train_tokenizer
from continuar.training.config import TokenizerRun
from continuar.training.trainer import Report


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Options of `continuar tokenizer train` besides the recipe's own fields."""

    recipes = TOKENIZER_RECIPES


def run(options: Options) -> None:
    """Train a tokenizer, a KL or VQ autoencoder, by a recipe.

    continuar tokenizer train RECIPE [options]
    torchrun --nproc-per-node N -m continuar tokenizer train RECIPE [options]     on N GPUs or processes
    continuar tokenizer train --list          recipes, one line each
    continuar tokenizer train RECIPE --help   every field of the recipe, with its value there
    continuar tokenizer train RECIPE --dry-run
    """
    if options.dry_run:
        print(dry_run(options.run), end="")
        return
    device = options.process_device()
    done = steps = 0
    with joined("ddp", device) as parallel, progress_bars(parallel.first) as bar:
        on_step = bar("training")

        def on_report(report: Report) -> None:
            nonlocal done, steps
            done, steps = report.step, report.steps
            on_step(done, steps)

        train_tokenizer(
            options.run,
            options.directory,
            device=device,
            resume=options.resume,
            force=options.force,
            on_report=on_report,
            on_read=bar("reading images"),
            parallel=parallel,
        )
    kept = options.directory / "tokenizer"
    if parallel.first and done < steps:
        print(f"stopped on request at step {done:,} of {steps:,}: {options.directory}  (--resume continues it)")
    elif parallel.first:
        print(f"trained: {kept}  (continuar tokenizer evaluate {kept} DATA; continuar cache DATA {kept} DST)")


def dry_run(run: TokenizerRun) -> str:
    """The resolved config and its sizes, as text; nothing is allocated."""
    with torch.device("meta"):
        network = run.tokenizer.network.build()
    lines = [
        json.dumps(to_json(run), indent=2),
        f"parameters        {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M",
        f"tokens per image  {tokens_text(run.tokenizer.spec)}",
        f"training          {run.train.steps:,} steps of {run.train.batch_size} images",
    ]
    return "\n".join(lines) + "\n"
