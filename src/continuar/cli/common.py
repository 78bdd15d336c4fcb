"""Arguments to dataclasses, by tyro; a value that a dataclass refuses becomes its own one-line error.

Progress bars on standard error; each appears when there is progress to show.

What commands that begin with a recipe's name have in common.

The sampling options of every head as command-line options, from the closed table of heads: a new head needs no line here.

The options that choose a feature network, and the device of a process, shared by ``stats``, ``evaluate`` and ``sweep``.

What a command's MODEL and --tokenizer name, as a pipeline.

What the commands that generate share: their settings, their progress bar, and a place to write to.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from continuar.checkpoints.mar import model_file, read_official, to_continuar
from continuar.checkpoints.store import load_state
from continuar.checkpoints.tokenizers import for_model
from continuar.config import kind_of, members
from continuar.devices import pick_device
from continuar.errors import UserError, require
from continuar.evaluation.networks import FeatureNetwork, load_network
from continuar.heads import HeadOptions, option_names
from continuar.pipeline import Pipeline, Weights, load
from continuar.sampling.engines import EngineName
from continuar.sampling.fast.weights import Precision
from continuar.sampling.generate import SamplingOptions, make_plan
from continuar.tokenizers import LatentConfig

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """An instance of the dataclass ``kind``; fields of ``default`` are what is not given.

    Raises:
        UserError: a value out of range.
        SystemExit: --help (0), or an option that does not exist (2); tyro has printed what to say.
    """
    config: tuple[Any, ...] = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    given: dict[str, Any] = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=arguments, prog=prog, description=description, config=config, **given)
    except SystemExit as stop:
        problem = _user_error(stop)
        if problem is not None:
            raise problem from None
        print(errors.getvalue(), end="", file=sys.stderr)
        raise


def _user_error(error: BaseException) -> UserError | None:
    """The `UserError` that an exception was raised while handling, if there is one."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause


Bar = Callable[[int, int], None]
"""To be called with (done, total)."""


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Callable[[str], Bar]]:
    """Yields what makes a bar of a name."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(file=sys.stderr), disable=not shown)
    tasks: dict[str, TaskID] = {}

    def bar(name: str) -> Bar:
        def update(done: int, total: int) -> None:
            if not tasks:
                progress.start()
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        return update

    try:
        yield bar
    finally:
        if tasks:
            progress.stop()


Recipes = Mapping[str, Callable[[], Any]]


def split_recipe(arguments: list[str], command: str, help_text: str, listed: Recipes | None = None) -> tuple[str, list[str]] | None:
    """The recipe's name and the options behind it; None where only help or a list was asked for, which is printed.

    Args:
        command: how the user calls it, without the recipe.
        listed: recipes that --help and --list show.

    Raises:
        UserError: an option comes first.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{help_text}\n{list_recipes(listed)}" if listed else help_text, end="")
        return None
    if listed and arguments[0] == "--list":
        print(list_recipes(listed), end="")
        return None
    name, rest = arguments[0], arguments[1:]
    require(not name.startswith("-"), f"the recipe comes first, not '{name}': {command} RECIPE {name} ...")
    return name, rest


def list_recipes(recipes: Recipes) -> str:
    """One line per recipe: its name and the first line of its docstring."""
    width = max(map(len, recipes))
    return "recipes:\n" + "".join(f"  {n:<{width}}  {(inspect.getdoc(r) or '').splitlines()[0]}\n" for n, r in recipes.items())


def field_docs(config: type) -> dict[str, str]:
    """The string that stands behind each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for line, following in pairwise(definition.body):
        match line, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs


def _fields() -> list[tuple[str, Any, Any]]:
    """One optional field per option: name, type, default None; its help names the head it belongs to."""
    found: dict[str, tuple[str, Any, Any]] = {}
    for config in members(HeadOptions):
        hints, docs = typing.get_type_hints(config), field_docs(config)
        for name in option_names(config):
            assert name not in found, f"two heads have an option '{name}'"
            described = tyro.conf.arg(help=f"{kind_of(config)} head: {docs[name]}", help_behavior_hint="(default: the model's)")
            found[name] = (name, Annotated[hints[name] | None, described], None)
    return list(found.values())


if TYPE_CHECKING:

    class AnyHeadOptions:
        """Stands for the class below, which has as many fields as the heads have options."""
else:
    AnyHeadOptions = dataclasses.make_dataclass("AnyHeadOptions", _fields(), frozen=True)


def given(options: Any) -> dict[str, Any]:
    """The options that were given, by name."""
    return {k: v for k, v in dataclasses.asdict(options).items() if v is not None}


@dataclass(frozen=True)
class NetworkOptions:
    """Which features images are compared by."""

    network: str = "inception"
    """inception (the FID network), squeezenet, classifier, dinov2 or pixels; only the first gives what is called FID."""
    network_weights: Path | None = None
    """Its weights: a file, or a directory for classifier and dinov2."""

    def load(self, device: torch.device) -> FeatureNetwork:
        """The network on a device."""
        return load_network(self.network, self.network_weights, device)


def local_device(name: str) -> torch.device:
    """As `pick_device`, with a GPU for each process of a machine under torchrun."""
    device = pick_device(name)
    spread = device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if spread else device


def load_pipeline(model: str, tokenizer: str | None, *, weights: Weights, device: str | torch.device) -> Pipeline:
    """A model that can make images.

    Args:
        model: a run directory, a saved model, a shipped name, or an official MAR checkpoint file.
        tokenizer: for a model of latents, its autoencoder; see `load_tokenizer`.

    Raises:
        UserError: not found, unreadable, or an autoencoder that is lacking, not needed or unfitting.
    """
    if Path(model).suffix == ".pth" and Path(model).is_file():
        pipe = load_official(Path(model), weights=weights, device=device)
    else:
        pipe = load(model, weights=weights, device=device)
    config = pipe.file.tokenizer
    if isinstance(config, LatentConfig):
        need = f"{model} makes latents of the autoencoder '{config.autoencoder}'; give it by --tokenizer (kl16.ckpt, a directory)"
        if tokenizer is None:
            raise UserError(need)
        pipe.tokenizer = for_model(config, tokenizer).to(pipe.device)
    else:
        require(tokenizer is None, f"--tokenizer is {tokenizer}, but {model} has a tokenizer of its own, of kind '{config.kind}'")
    return pipe


def load_official(path: Path, *, weights: Weights, device: str | torch.device) -> Pipeline:
    """An official MAR checkpoint file as it is; nothing is written."""
    official = read_official(path, weights)
    file, _ = model_file(official)
    state = to_continuar(official.state, file.model, str(path))
    with torch.device("meta"):
        model = file.model.build()
    model.to_empty(device="cpu")
    load_state(model, state, str(path))
    return Pipeline(file, model.float().to(pick_device(device)))


LISTED = "samples.json"


@dataclass(frozen=True)
class SamplingSettings:
    """How to generate; what is not given is the model's own."""

    steps: int | None = None
    """Autoregressive steps, 1 to the number of tokens."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(aliases=["--guidance"])] = None
    """Scale of classifier-free guidance, 0 or more; 1 is none."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """How guidance grows over the steps."""
    temperature: float | None = None
    """0 or more; lower is less diverse."""
    head: Annotated[AnyHeadOptions, tyro.conf.arg(name="")] = field(default_factory=AnyHeadOptions)

    def given(self) -> dict[str, Any]:
        """What was given, by name, as `Pipeline.__call__` takes it."""
        own = {"steps": self.steps, "guidance_scale": self.guidance_scale, "guidance_schedule": self.guidance_schedule}
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
        make_plan(pipe.model.order, options, pipe.model.order.seq_len)
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
