"""``continuar convert SRC DST``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from continuar.checkpoints.mar import describe
from continuar.checkpoints.official import Converted, export_official, import_official
from continuar.cli.parse import parse
from continuar.errors import require
from continuar.pipeline import find_model, shipped_models

_DESCRIPTION = (
    "Convert an official MAR checkpoint file into a saved model (DST a directory), or a saved model or run into an "
    "official checkpoint file (DST ending in .pth). Every key and shape is checked, and no bit of a weight changes."
)


@dataclass(frozen=True)
class Arguments:
    """Convert between official MAR checkpoints and saved models."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """An official checkpoint file; or a saved model, a run directory, a checkpoint or a shipped name."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """A new or empty directory, or a saved model to replace; or a file ending in .pth."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of an official file. Into one: raw puts the raw weights in both places."""
    heads: int | None = None
    """Attention heads of the encoder, where the official file does not tell them."""
    decoder_heads: int | None = None
    """Attention heads of the decoder, where the official file does not tell them."""
    overwrite: bool = False
    """Replace an existing .pth file."""


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    options = parse(Arguments, arguments, prog="continuar convert", description=_DESCRIPTION)
    done = _export(options) if options.dst.suffix == ".pth" else _import(options)
    print(summary(options.src, options.dst, done), end="")
    return 0


def _import(options: Arguments) -> Converted:
    source = Path(options.src)
    ours = source.is_dir() or (not source.exists() and options.src in shipped_models())
    require(not ours, f"SRC {source} is not an official file, so DST must end in .pth; it is {options.dst}")
    require(not options.overwrite, "--overwrite is for a DST ending in .pth; a saved model is replaced without it")
    return import_official(source, options.dst, weights=options.weights, heads=options.heads, decoder_heads=options.decoder_heads)


def _export(options: Arguments) -> Converted:
    require(not Path(options.src).is_file(), f"SRC and DST are both files; for {options.src}, DST must be a directory")
    for name, value in (("--heads", options.heads), ("--decoder-heads", options.decoder_heads)):
        require(value is None, f"{name} is {value}; a saved model knows its own, so it is not allowed here")
    return export_official(find_model(options.src), options.dst, weights=options.weights, overwrite=options.overwrite)


def summary(source: str, destination: Path, done: Converted) -> str:
    """What was read and written, one line each."""
    spec = done.file.model.tokens
    parameters = sum(v.numel() for v in done.state.values())
    dtypes = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in done.state.values()}))
    lines = [
        f"read     {source} ({done.weights})",
        f"model    {describe(done.file.model)}",
        f"tokens   {spec.grid[0]} x {spec.grid[1]} of dim {spec.dim}; {done.file.model.classes} classes",
        f"weights  {parameters / 1e6:.2f} M parameters in {done.tensors} tensors, {dtypes}",
        *(f"note     {note}" for note in done.notes),
        f"written  {destination}",
    ]
    return "\n".join(lines) + "\n"
