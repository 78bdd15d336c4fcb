"""What the commands that generate share: their settings, their progress bar, and a place to write to."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from continuar.cli.head_options import AnyHeadOptions, given
from continuar.cli.load import load_pipeline
from continuar.errors import require
from continuar.generation.engines import EngineName
from continuar.generation.plan import SamplingOptions, make_plan
from continuar.generation.weights import Precision
from continuar.pipeline import Pipeline

LISTED = "samples.json"


@dataclass(frozen=True)
class SamplingSettings:
    """How to generate; what is not given is the model's own."""

    steps: int | None = None
    """Autoregressive steps, 1 to the number of tokens."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 0 or more; 1 is none."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """How guidance grows over the steps."""
    temperature: float | None = None
    """0 or more; lower is less diverse."""
    head: Annotated[AnyHeadOptions, tyro.conf.arg(name="")] = field(default_factory=AnyHeadOptions)

    def given(self) -> dict[str, Any]:
        """What was given, by name, as `Pipeline.__call__` takes it."""
        own = {"steps": self.steps, "guidance": self.guidance, "guidance_schedule": self.guidance_schedule}
        return {k: v for k, v in (own | {"temperature": self.temperature}).items() if v is not None} | given(self.head)


@dataclass(frozen=True)
class RunningSettings(SamplingSettings):
    """How to generate, and who computes it."""

    engine: EngineName = "auto"
    """Who generates: eager, readably; graphs, faster and equal to it; auto, graphs where it can run the model."""
    precision: Precision = "float32"
    """float32, or bfloat16 for the matrix products of the graphs engine: faster on a GPU, images slightly other than float32's."""

    def running(self) -> dict[str, Any]:
        """How the pipeline is to compute, as it takes it."""
        return {"engine": self.engine, "precision": self.precision}


@dataclass(frozen=True)
class Settings(RunningSettings):
    """How to generate, and with what."""

    batch_size: int = 64
    """Images generated at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of a training run."""
    tokenizer: str | None = None
    """For a model of latents: its autoencoder (a saved tokenizer, an LDM-layout file such as kl16.ckpt, a diffusers directory or
    hub id)."""

    def load(self, model: str) -> Pipeline:
        """The model, on the device, with the autoencoder that was given for its latents.

        Raises:
            UserError: no such model or device, or an autoencoder that is lacking or unfitting.
        """
        require(self.batch_size >= 1, f"--batch-size is {self.batch_size}; allowed: 1 or more")
        return load_pipeline(model, self.tokenizer, weights=self.weights, device=self.device)

    def running(self) -> dict[str, Any]:
        """How the pipeline is to compute, as it takes it."""
        return {"batch_size": self.batch_size, **super().running()}

    def options(self, pipe: Pipeline) -> SamplingOptions:
        """The model's own options, overridden by what was given.

        Raises:
            UserError: a value out of range, or steps that the model cannot take.
        """
        options = pipe.defaults.override(**self.given())
        make_plan(pipe.model.order, options, pipe.model.order.positions)
        if options.head is not None:
            options.head.check_tokens(pipe.model.config.tokens.size)
        return options


def make_writable(directory: Path) -> None:
    """Makes the directory; fails before the work, not after it.

    Raises:
        UserError: it is a file.
        OSError: it cannot be written to.
    """
    require(not directory.exists() or directory.is_dir(), f"--out is the file {directory}; allowed: a directory")
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".writable"
    probe.touch()
    probe.unlink()
    drop_earlier(directory)


def drop_earlier(directory: Path) -> None:
    """Removes what an earlier call wrote there, which would stand beside what is listed now; nothing else."""
    if (directory / LISTED).is_file():
        for path in directory.iterdir():
            if re.fullmatch(r"\d{5}\.png|grid\.(png|gif)", path.name):
                path.unlink()
        (directory / LISTED).unlink()


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr: what it yields is called with (steps done, steps in all)."""
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("generating", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
