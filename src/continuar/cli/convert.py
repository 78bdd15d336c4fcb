"""``continuar convert SRC DST``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from continuar.checkpoints.ldm import is_ldm
from continuar.checkpoints.mar import Converted, describe, export_official, import_official
from continuar.checkpoints.tokenizers import Changes, find_saved
from continuar.cli import convert_tokenizer as autoencoders
from continuar.cli.common import Ids
from continuar.errors import require
from continuar.pipeline import find_model, shipped_models


@dataclass(frozen=True)
class Options:
    """Options of `continuar convert`."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """An official checkpoint or autoencoder file; or a saved model or tokenizer, a run directory, a checkpoint, a shipped name."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """A new or empty directory, or a saved model or tokenizer to replace; or a file ending in .pth or .ckpt."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights to read from an official file. Into an official file, raw writes the raw weights in place of the averages."""
    heads: int | None = None
    """Attention heads of the encoder, if the official file does not say."""
    decoder_heads: int | None = None
    """Attention heads of the decoder, if the official file does not say."""
    overwrite: bool = False
    """Replace an existing .pth or .ckpt file."""
    like: str | None = None
    """For an autoencoder: take scale and patch of this tokenizer of the paper's Table 2 (vq16, kl16, kl8, kl16_mar)."""
    image_size: int | None = None
    """For an autoencoder: side of the images in pixels; 256 if not given."""
    patch: int | None = None
    """For an autoencoder: side of the square of latents that makes one token."""
    scale: float | None = None
    """For an autoencoder: 1/std of its latents, if it is known."""
    ids: Ids = False

    @property
    def changes(self) -> Changes:
        """How the autoencoder will be used."""
        return Changes(self.image_size, self.patch, self.scale, self.ids or None)


def run(options: Options) -> None:
    """Convert official files into saved models and tokenizers, and back; no bit of a weight changes.

    An official MAR checkpoint file becomes a saved model (DST a directory). A saved model or a run becomes an official checkpoint
    file (DST ending in .pth). An autoencoder in the layout of latent diffusion (kl16.ckpt, kl-f16, vq-f16, kl-f8) becomes a saved
    tokenizer (DST a directory), and back (DST ending in .ckpt). Every key and shape is checked.
    """
    source, to_file = Path(options.src), options.dst.suffix in autoencoders.SUFFIXES
    if to_file or is_ldm(source):
        _check_unused(options, "an autoencoder", weights="ema", heads=None, decoder_heads=None)
        done = _export_autoencoder(options) if to_file else _import_autoencoder(options)
        print(autoencoders.summary(options.src, options.dst, done), end="")
        return
    _check_unused(options, "a model", like=None, image_size=None, patch=None, scale=None, ids=False)
    done = _export(options) if options.dst.suffix == ".pth" else _import(options)
    print(summary(options.src, options.dst, done), end="")


def _check_unused(options: Options, what: str, **unset: object) -> None:
    """Refuses options that mean nothing for ``what`` is converted."""
    for name, value in unset.items():
        given = getattr(options, name)
        require(given == value, f"--{name.replace('_', '-')} is {given}, which is not for {what}")


def _import_autoencoder(options: Options) -> autoencoders.Converted:
    require(not options.overwrite, "--overwrite is for a DST ending in .pth or .ckpt; a saved tokenizer is replaced without it")
    require(options.dst.suffix != ".pth", f"SRC {options.src} is an autoencoder, so DST must be a directory; it is {options.dst}")
    return autoencoders.import_tokenizer(Path(options.src), options.dst, options.changes, options.like)


def _export_autoencoder(options: Options) -> autoencoders.Converted:
    _check_unused(options, "a DST ending in .ckpt", like=None, image_size=None, patch=None, scale=None, ids=False)
    saved = find_saved(Path(options.src)) is not None
    require(saved, f"SRC {options.src} is not a saved tokenizer; a DST ending in .ckpt is made of one")
    return autoencoders.export_tokenizer(Path(options.src), options.dst, overwrite=options.overwrite)


def _import(options: Options) -> Converted:
    source = Path(options.src)
    ours = source.is_dir() or (not source.exists() and options.src in shipped_models())
    require(not ours, f"SRC {source} is not an official file, so DST must end in .pth; it is {options.dst}")
    require(not options.overwrite, "--overwrite is for a DST ending in .pth; a saved model is replaced without it")
    return import_official(source, options.dst, weights=options.weights, heads=options.heads, decoder_heads=options.decoder_heads)


def _export(options: Options) -> Converted:
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
