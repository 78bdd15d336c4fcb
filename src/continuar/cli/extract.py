"""``continuar extract RUN DST``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from continuar.checkpoints.store import check_replaceable, load_state
from continuar.cli.common import Destination, RunWeights
from continuar.errors import require
from continuar.pipeline import Pipeline
from continuar.training.power_ema import reconstruct


@dataclass(frozen=True)
class Options:
    """Options of `continuar extract`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory, or one of its checkpoints."""
    dst: Destination
    """A new or empty directory, or a saved model to replace."""
    weights: RunWeights = "ema"
    length: float | None = None
    """Instead: an average of this length, as a share of the training before it; above 0 to below 0.28."""
    step: int | None = None
    """With --length: the step at which the average ends; averages must have been written there. The last one if not given."""
    bf16: bool = False
    """Store weights in bfloat16, at half the size."""


def run(options: Options) -> None:
    """Write a saved model, ready to share, from a training run.

    It holds the averaged weights, the raw weights, or an average of a length chosen now (from a run with --ema.snapshot-images).
    Weights that several processes wrote are joined.
    """
    check_replaceable(options.dst)
    require(options.length is not None or options.step is None, f"--step is {options.step} without --length; allowed: with it")
    require(options.length is None or options.weights == "ema", "--length and --weights raw contradict one another")
    pipe = Pipeline.from_pretrained(options.run, weights=options.weights, device="cpu")
    what = {"ema": "averaged weights", "raw": "raw weights"}[options.weights]
    if options.length is not None:
        state, step = reconstruct(options.run, options.length, options.step)
        load_state(pipe.model, state, str(options.run))
        what = f"the average of length {options.length:g} that ends at step {step}"
    pipe.save_pretrained(options.dst, torch.bfloat16 if options.bf16 else None)
    print(f"written  {options.dst}: {what}")
