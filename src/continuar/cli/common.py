"""Pieces that commands share: parsing, progress display, recipes, options, and loading a model.

A command is a function with one parameter ``options``, a dataclass. tyro makes its command-line options from the fields of the
dataclass, and its help from their docstrings and from the docstring of the function.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from continuar import distributed
from continuar.checkpoints.mar import model_file, read_official, to_continuar
from continuar.checkpoints.store import load_state
from continuar.checkpoints.tokenizers import for_model
from continuar.config import kind_of, members
from continuar.distributed import pick_device
from continuar.errors import UserError, require
from continuar.evaluation.networks import FeatureNetwork, load_network
from continuar.heads import HeadOptions, option_names
from continuar.io import write_json
from continuar.pictures import save_png
from continuar.pipeline import EngineName, Pipeline, Weights, load, shipped_models
from continuar.recipes import Recipes, find_recipe
from continuar.sampling.fast.weights import Precision
from continuar.sampling.generate import make_plan
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import LatentConfig, TokenSpec

T = TypeVar("T")


# Parsing.


def run_command(command: Callable[[Any], None], name: str, arguments: list[str]) -> None:
    """Runs a command with the options that ``arguments`` give.

    Raises:
        UserError: a value out of range, an unknown recipe, or whatever the command refuses.
        SystemExit: --help (0), or an option that does not exist (2); tyro has printed the message.
    """
    kind, about = typing.get_type_hints(command)["options"], inspect.getdoc(command) or ""
    if not issubclass(kind, RecipeOptions):
        command(parse(kind, arguments, prog=name, description=about))
        return
    if not arguments or arguments[0] in ("-h", "--help", "--list"):
        print(("" if arguments == ["--list"] else f"{about}\n\n") + list_recipes(kind.recipes))
        return
    recipe_name, rest = arguments[0], arguments[1:]
    require(not recipe_name.startswith("-"), f"the recipe comes first, not '{recipe_name}': {name} RECIPE {recipe_name} ...")
    recipe = find_recipe(recipe_name, kind.recipes)
    default = kind(recipe(), recipe_name)
    command(parse(kind, rest, prog=f"{name} {recipe_name}", description=inspect.getdoc(recipe) or "", default=default))


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """An instance of the dataclass ``kind``; ``default`` supplies the fields that are not given.

    Raises:
        UserError: a value out of range.
        SystemExit: --help (0), or an option that does not exist (2); tyro has printed the message.
    """
    # A comment above a field says why the code is so; it is no help text.
    config: tuple[Any, ...] = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=arguments, prog=prog, description=description, config=config, **defaults)
    except SystemExit as stop:
        # tyro turns a ValueError of a dataclass into a box of many lines. The UserError below it is the one line to show.
        cause = stop.__cause__ or stop.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        print(errors.getvalue(), end="", file=sys.stderr)
        raise


def at_least(least: int, **values: int | None) -> None:
    """Refuses options below ``least``; one that is not given (None) passes.

    Raises:
        UserError: the first value that is too small.
    """
    for name, value in values.items():
        require(value is None or value >= least, f"--{name.replace('_', '-')} is {value}; allowed: {least} or more")


# Progress.


class ShowProgress(typing.Protocol):
    """Moves one bar: ``done`` of ``total``, with a text behind it that stays until another is given."""

    def __call__(self, done: int, total: int, status: str = "", /) -> None: ...


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Callable[[str], ShowProgress]]:
    """Progress bars on standard error. Yields a function that makes a bar of a name; the bar appears when it first moves."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console, disable=not shown)
    tasks: dict[str, TaskID] = {}

    def bar(name: str) -> ShowProgress:
        def update(done: int, total: int, status: str = "", /) -> None:
            if not tasks:
                progress.start()
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total, status="")
            progress.update(tasks[name], completed=done, total=total)
            if status:
                progress.update(tasks[name], status=status)

        return update

    try:
        yield bar
    finally:
        # A display that never started would still print an empty line.
        if tasks:
            progress.stop()


# Options.

Model = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        metavar="MODEL",
        help=f"A run directory, a saved model, a shipped one ({', '.join(shipped_models())}), or an official MAR checkpoint file.",
    ),
]
Destination = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
Device = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:N or mps.")]
RunWeights = Annotated[Weights, tyro.conf.arg(help="Weights of a training run to use: averaged (ema) or raw.")]
Autoencoder = Annotated[
    str | None,
    tyro.conf.arg(
        help="Autoencoder of a model of latents: a saved tokenizer, a file in LDM's layout such as kl16.ckpt, a diffusers "
        "directory or a hub id."
    ),
]
Ids = Annotated[
    bool, tyro.conf.arg(help="For a VQ autoencoder: make ids of the codebook, instead of the vectors before quantisation.")
]
Split = Annotated[str, tyro.conf.arg(help="Part of the data to read, if it has several.")]
ImageSize = Annotated[
    int | None, tyro.conf.arg(help="Side of the images in pixels.", help_behavior_hint="(default: the tokenizer's own)")
]
_MODEL_DEFAULT = tyro.conf.arg(help_behavior_hint="(default: the model's)")


# Recipes.


@dataclass(frozen=True)
class RecipeOptions:
    """Options of a command whose first argument is the name of a recipe. The recipe's own fields are options, too."""

    recipes: typing.ClassVar[Recipes]
    """The recipes that the command takes, by name."""

    run: Annotated[Any, tyro.conf.arg(name="")]
    recipe: tyro.conf.Suppress[str]


def list_recipes(recipes: Recipes) -> str:
    """One line per recipe: its name and the first line of its docstring."""
    width = max(map(len, recipes))
    first = {name: (inspect.getdoc(recipe) or "").partition("\n")[0] for name, recipe in recipes.items()}
    return "recipes:\n" + "\n".join(f"  {name:<{width}}  {line}" for name, line in first.items())


@dataclass(frozen=True)
class TrainingOptions(RecipeOptions):
    """Options of a training besides the recipe's own fields."""

    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: runs/RECIPE)")] = None
    """The run directory."""
    resume: bool = False
    """Continue the run in that directory exactly, from its newest intact checkpoint."""
    force: bool = False
    """Resume although the config differs from the one with which the run began."""
    device: Device = "auto"
    dry_run: bool = False
    """Print the resolved config, the parameters and what training costs, and stop."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.out or Path("runs") / self.recipe

    def process_device(self) -> torch.device:
        """The device, or under torchrun this process's own one."""
        device = pick_device(self.device)
        return distributed.local_device(device) if distributed.processes() else device


def field_docs(config: type) -> dict[str, str]:
    """The docstring behind each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for line, following in pairwise(definition.body):
        match line, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs


def _head_fields() -> list[tuple[str, Any, Any]]:
    """One optional field per sampling option of a head: name, type, default None; its help names the head."""
    found: dict[str, tuple[str, Any, Any]] = {}
    for config in members(HeadOptions):
        hints, docs = typing.get_type_hints(config), field_docs(config)
        for name in option_names(config):
            assert name not in found, f"two heads have an option '{name}'"
            described = tyro.conf.arg(help=f"{kind_of(config)} head: {docs[name]}", help_behavior_hint="(default: the model's)")
            found[name] = (name, Annotated[hints[name] | None, described], None)
    return list(found.values())


# Made from the closed table of heads, so that a new head needs no line here.
if TYPE_CHECKING:

    class AnyHeadOptions:
        """Sampling options of every head; each is None if it is not given."""
else:
    AnyHeadOptions = dataclasses.make_dataclass("AnyHeadOptions", _head_fields(), frozen=True)


@dataclass(frozen=True)
class NetworkOptions:
    """The network whose features are compared."""

    network: str = "inception"
    """inception (the FID network), squeezenet, classifier, dinov2 or pixels. Only inception gives what is called FID."""
    network_weights: Path | None = None
    """Weights of the network: a file, or a directory for classifier and dinov2."""

    def load(self, device: torch.device) -> FeatureNetwork:
        """The network on a device."""
        return load_network(self.network, self.network_weights, device)


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings, and the engine that computes. The model has its own settings for those that are not given."""

    steps: Annotated[int | None, _MODEL_DEFAULT] = None
    """Autoregressive steps, 1 to the number of tokens."""
    guidance_scale: Annotated[float | None, tyro.conf.arg(aliases=["--guidance"], help_behavior_hint="(default: the model's)")] = (
        None
    )
    """Scale of classifier-free guidance, 0 or more; 1 is none."""
    guidance_schedule: Annotated[Literal["linear", "constant"] | None, _MODEL_DEFAULT] = None
    """Guidance over the steps: growing linearly to the scale, or the scale at every step."""
    temperature: Annotated[float | None, _MODEL_DEFAULT] = None
    """Sampling temperature, 0 or more; lower is less diverse."""
    head: Annotated[AnyHeadOptions, tyro.conf.arg(name="")] = field(default_factory=AnyHeadOptions)
    engine: EngineName = "auto"
    """eager: the readable loop. fast: equal to it, and faster. auto: fast where it can run the model."""
    precision: Precision = "float32"
    """Precision of matrix products. bfloat16 needs the fast engine and is faster on a GPU; images differ slightly."""

    def given(self) -> dict[str, Any]:
        """The settings that were given, by name, as `Pipeline.__call__` takes them."""
        names = ("steps", "guidance_scale", "guidance_schedule", "temperature")
        settings = {name: getattr(self, name) for name in names} | dataclasses.asdict(typing.cast(Any, self.head))
        return {name: value for name, value in settings.items() if value is not None}

    def running(self) -> dict[str, Any]:
        """Engine and precision, by name, as `Pipeline.__call__` takes them."""
        return {"engine": self.engine, "precision": self.precision}


@dataclass(frozen=True)
class Settings(SamplingSettings):
    """Sampling settings, the engine, and the model's weights, autoencoder and device."""

    batch_size: int = 64
    """Images generated together."""
    device: Device = "auto"
    weights: RunWeights = "ema"
    tokenizer: Autoencoder = None

    def load(self, model: str) -> Pipeline:
        """The model on the device, with its autoencoder.

        Raises:
            UserError: no such model or device, or an autoencoder that is lacking or does not fit.
        """
        at_least(1, batch_size=self.batch_size)
        return load_pipeline(model, self.tokenizer, weights=self.weights, device=self.device)

    def running(self) -> dict[str, Any]:
        """Batch size, engine and precision, by name, as `Pipeline.__call__` takes them."""
        return {"batch_size": self.batch_size, **super().running()}

    def record(self, model: str) -> dict[str, Any]:
        """The model and the settings of its weights, for samples.json."""
        return {"model": model, "weights": self.weights, "precision": self.precision}

    def options(self, pipe: Pipeline) -> SamplingOptions:
        """The model's own options, overridden by those that were given.

        Raises:
            UserError: a value out of range, or steps that the model cannot take.
        """
        options = pipe.defaults.override(**self.given())
        make_plan(pipe.model.order, options, pipe.model.order.seq_len)
        if options.head is not None:
            options.head.check_tokens(pipe.model.config.tokens.size)
        return options


def tokens_text(spec: TokenSpec) -> str:
    """Number, grid and kind of tokens, for people: ``16 (4 x 4) of dim 4``."""
    kind = f"of dim {spec.dim}" if spec.kind == "vector" else f"of {spec.vocabulary} ids"
    return f"{spec.seq_len} ({spec.grid[0]} x {spec.grid[1]}) {kind}"


# Loading a model, and where to compute and to write.


def local_device(name: str) -> torch.device:
    """The device a name means. Under torchrun, "auto" and "cuda" are the process's own GPU."""
    device = pick_device(name)
    rank = os.environ.get("LOCAL_RANK", "")
    if device.type != "cuda" or device.index is not None or not rank.isdecimal():
        return device
    # More processes than GPUs share them: work without collectives, such as caching, is then still spread evenly.
    return torch.device("cuda", int(rank) % torch.cuda.device_count())


def load_pipeline(
    model: str, tokenizer: str | None, *, weights: Weights, device: str | torch.device, tokens_only: bool = False
) -> Pipeline:
    """A model that can generate images.

    Args:
        model: a run directory, a saved model, a shipped name, or an official MAR checkpoint file.
        tokenizer: the autoencoder of a model of latents, as `load_tokenizer` takes it.
        tokens_only: a model of latents needs no autoencoder, because nothing is decoded.

    Raises:
        UserError: not found, unreadable, or an autoencoder that is lacking, not needed or does not fit.
    """
    if Path(model).suffix == ".pth" and Path(model).is_file():
        pipe = load_official(Path(model), weights=weights, device=device)
    else:
        pipe = load(model, weights=weights, device=device)
    add_tokenizer(pipe, model, tokenizer, needed=not tokens_only)
    return pipe


def add_tokenizer(pipe: Pipeline, model: str, tokenizer: str | None, *, needed: bool = True) -> None:
    """Gives a model of latents its autoencoder.

    Raises:
        UserError: an autoencoder that is lacking, not needed or does not fit.
    """
    config = pipe.config.tokenizer
    if not isinstance(config, LatentConfig):
        require(tokenizer is None, f"--tokenizer is {tokenizer}, but {model} has a tokenizer of its own, of kind '{config.kind}'")
    elif tokenizer is not None:
        pipe.tokenizer = for_model(config, tokenizer).to(pipe.device)
    elif needed:
        raise UserError(
            f"{model} generates latents of the autoencoder '{config.autoencoder}'; give it by --tokenizer: kl16.ckpt, a directory"
        )


def load_official(path: Path, *, weights: Weights, device: str | torch.device) -> Pipeline:
    """An official MAR checkpoint file as a pipeline; nothing is written."""
    official = read_official(path, weights)
    file, _ = model_file(official)
    state = to_continuar(official.state, file.model, str(path))
    with torch.device("meta"):
        model = file.model.build()
    model.to_empty(device="cpu")
    load_state(model, state, str(path))
    return Pipeline(file, model.float().to(pick_device(device)))


def make_writable(directory: Path) -> None:
    """Makes an output directory, and removes the images of an earlier call from it.

    Raises:
        UserError: it is a file.
        OSError: it cannot be written to.
    """
    require(not directory.exists() or directory.is_dir(), f"--out is the file {directory}; allowed: a directory")
    directory.mkdir(parents=True, exist_ok=True)
    # Fails before the work, not after it.
    probe = directory / ".writable"
    probe.touch()
    probe.unlink()
    # Images of an earlier call would stand beside those that samples.json lists now. Nothing else is removed.
    listed = directory / "samples.json"
    if listed.is_file():
        for path in directory.iterdir():
            if re.fullmatch(r"\d{5}\.png|grid\.(png|gif)", path.name):
                path.unlink()
        listed.unlink()


def write_samples(directory: Path, images: np.ndarray, entries: Sequence[dict[str, Any]], shared: dict[str, Any]) -> None:
    """Writes images as 00000.png, 00001.png, ..., and samples.json, which holds one entry per image.

    Args:
        images: uint8 [B, H, W, 3].
        entries: what belongs to one image, such as its seed.
        shared: what every entry holds.
    """
    files = [f"{i:05d}.png" for i in range(len(images))]
    for file, pixels in zip(files, images, strict=True):
        save_png(pixels, directory / file)
    write_json(directory / "samples.json", [{"file": f, **entry, **shared} for f, entry in zip(files, entries, strict=True)])
