"""Official MAR checkpoint files (``.pth``), both ways. The key layout itself is in `mar`.

1. Reading runs nothing that a file holds: tensors, plain values and ``argparse.Namespace`` are all that is let in.
2. Sizes come from the tensors' shapes. What no shape tells (attention heads, dropout, the autoencoder) comes from the
   file's ``args``; whatever else ``args`` says must agree with the shapes.
3. Writing is the same backwards, so that official -> ours -> official gives back every bit.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from continuar.checkpoints.mar import to_continuar, to_official
from continuar.checkpoints.official_args import OfficialFile, latent_sizes, model_file, official_args, shown
from continuar.checkpoints.store import (
    CONFIG,
    EMA,
    WEIGHTS,
    ModelFile,
    atomic_directory,
    check_keys,
    read_model_file,
    read_tensors,
    write_json,
    write_tensors,
)
from continuar.errors import UserError, require
from continuar.tokenizers import LatentConfig

Weights = Literal["ema", "raw"]
_ENTRY = {"ema": "model_ema", "raw": "model"}
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ONLY_PLAIN = "only plain tensors, numbers and argparse.Namespace are read from checkpoint files"
# What torch's reader raises for a damaged file depends on where the damage is; found by flipping bytes.
_DAMAGED = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError)
_DAMAGED += (AttributeError, AssertionError, struct.error)


@dataclass(frozen=True)
class Converted:
    """What a conversion did, for people."""

    file: ModelFile
    state: Mapping[str, Tensor]
    """Weights in our layout; of two sets, the raw ones."""
    tensors: int
    """How many tensors a set of weights has in the official layout."""
    weights: str
    """Which weights were taken."""
    notes: tuple[str, ...]
    """What was assumed, or has no place in the other format."""


def import_official(
    source: Path,
    destination: Path,
    *,
    weights: Weights = "ema",
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Converted:
    """Writes an official checkpoint file as a saved model. A saved model at ``destination`` is replaced at once.

    Args:
        weights: "ema" or "raw"; of a bare state dict, its only set either way.
        heads, decoder_heads: attention heads, where neither the width nor the file's ``args`` tell them.

    Raises:
        UserError: unreadable, not a MAR, contradictory, or the destination cannot be written; nothing is left behind.
    """
    destination = Path(os.path.abspath(destination))
    _check_directory(destination, source)
    official = read_official(source, weights)
    file, notes = model_file(official, heads=heads, decoder_heads=decoder_heads)
    ours = to_continuar(official.state, file.model, str(source))
    with _written(destination), atomic_directory(destination) as temporary:
        write_json(temporary / CONFIG, file)
        write_tensors(temporary / WEIGHTS, ours)
    return Converted(file, ours, len(official.state), official.entry or "a bare state dict", notes)


def export_official(source: Path, destination: Path, *, weights: Weights = "ema", overwrite: bool = False) -> Converted:
    """Writes a saved model or a training checkpoint as an official file.

    Not everything has a place there: sampling settings, class names and ``backbone.mask_granularity`` are left out.

    Args:
        weights: "ema": raw weights as 'model', their EMA as 'model_ema'; "raw": raw weights as both.
        overwrite: an existing file is replaced.

    Raises:
        UserError: the source cannot be read; or see `write_official`.
    """
    _check_file(destination, overwrite)
    file = read_model_file(source)
    model = read_tensors(source / WEIGHTS)
    scale = latent_sizes(file)[-1]
    notes = [f"tokens are latents x {scale:.6g}; official code has x {LatentConfig.scale} written into it"]
    notes = notes if scale != LatentConfig.scale else []
    if weights == "ema" and (source / EMA).is_file():
        ema, taken = read_tensors(source / EMA), f"{WEIGHTS} as 'model', {EMA} as 'model_ema'"
    else:
        ema, taken = model, f"{WEIGHTS} as 'model' and 'model_ema'"
        if weights == "ema":
            notes.append("the source has one set of weights: 'model' and 'model_ema' both hold it")
    tensors = write_official(destination, file, model, ema, overwrite=overwrite)
    return Converted(file, model, tensors, taken, tuple(notes))


def read_official(path: Path, weights: Weights = "ema") -> OfficialFile:
    """Reads one set of weights of an official file, mapped from the disk rather than copied.

    Raises:
        UserError: missing, damaged, of another format, with anything but plain tensors in it, or without these weights.
    """
    require(weights in _ENTRY, f"weights is '{weights}'; allowed: {', '.join(_ENTRY)}")
    content = _load(path)
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}; a dict with 'model_ema' is expected")
    entry, state = _select(content, weights, path)
    args = content.get("args") if entry else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    require(args is None or isinstance(args, dict), f"'args' of {path} is a {type(args).__name__}, not a Namespace")
    return OfficialFile(path, _tensors(state, path), {k: v for k, v in (args or {}).items() if v is not None}, entry)


def write_official(
    path: Path, file: ModelFile, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], *, overwrite: bool = False
) -> int:
    """Writes two sets of weights (in our layout; may be one and the same) as an official file, all of it or nothing.

    Returns:
        how many tensors a set has there.

    Raises:
        UserError: the file exists or cannot be written; weights do not fit the config; the model is not a MAR.
    """
    _check_file(path, overwrite)
    args = official_args(file)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in file.model.build().state_dict().items()}
    for state in (model, ema):
        check_keys(state, shapes, "the source")
    layout = to_official(model, file.model)
    average = layout if ema is model else to_official(ema, file.model)
    with _written(path), _atomic_file(path) as handle:
        torch.save({"model": layout, "model_ema": average, "args": argparse.Namespace(**args)}, handle)
    return len(layout)


def _load(path: Path) -> Any:
    """The content of a torch file; no object that could run code is made."""
    require(not path.is_dir(), f"{path} is a directory; an official checkpoint file (.pth) is expected")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
    require(bool(start), f"{path} is empty")
    zipped = start.startswith(_ZIP)
    require(zipped or start == _LEGACY, f"{path} is {_kind(start)}, not a checkpoint of torch.save; {_ONLY_PLAIN}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # About the pickle protocols and storage classes of old or damaged files; what matters is an error.
            warnings.simplefilter("ignore", UserWarning)
            # Only the zip format, torch's since 1.6, can be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as problem:
        # Not chained: torch's message advises to load unsafely.
        found = re.search(r"GLOBAL ([\w.]+)", str(problem))
        held = found[1] if found else "more than tensors, or is damaged"
        raise UserError(f"{path} holds {held}; {_ONLY_PLAIN}") from None
    except _DAMAGED as problem:
        raise UserError(f"{path} is truncated, damaged or not a checkpoint of torch.save; {_ONLY_PLAIN}") from problem


def _kind(start: bytes) -> str:
    if start[8:9] == b"{":
        return "a safetensors file"
    return "a plain pickle" if start[:1] == b"\x80" else f"a file that begins with {start!r}"


def _select(content: dict[Any, Any], weights: Weights, where: Path) -> tuple[str, Mapping[Any, Any]]:
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return "", content
    usable = [e for e in _ENTRY.values() if isinstance(content.get(e), dict) and content[e]]
    if _ENTRY[weights] in usable:
        return _ENTRY[weights], content[_ENTRY[weights]]
    held = ", ".join(shown(k).strip("'") for k in [*content][:12] if content[k] is not None)
    hint = "; --weights raw takes 'model'" if "model" in usable else ""
    raise UserError(f"{where} has no weights '{_ENTRY[weights]}'; it holds: {held or 'nothing'}{hint}")


def _tensors(state: Mapping[Any, Any], where: Path) -> dict[str, Tensor]:
    """A state dict's tensors, without the prefix that DistributedDataParallel gives to all names."""
    for k, v in state.items():
        plain = isinstance(v, Tensor) and v.is_floating_point() and v.layout == torch.strided and v.device.type == "cpu"
        named = isinstance(k, str) and k.isprintable()
        require(named and plain, f"{where}: {shown(k)} is not a plain tensor of floating-point numbers")
    prefix = "module." if all(k.startswith("module.") for k in state) else ""
    return {k.removeprefix(prefix): v.detach() for k, v in state.items()}


def _check_directory(destination: Path, source: Path) -> None:
    """Only an empty directory or a saved model may be replaced; a run directory has a config, too, but no weights."""
    require(not destination.exists() or destination.is_dir(), f"{destination} is a file; a saved model is a directory")
    saved = (destination / CONFIG).is_file() and (destination / WEIGHTS).is_file()
    free = saved or not destination.exists() or not any(destination.iterdir())
    require(free, f"{destination} exists and is not a saved model; choose another directory")
    inside = destination.resolve() in source.resolve().parents
    require(not inside, f"{source} lies in {destination}, which would be replaced; choose another directory")


def _check_file(path: Path, overwrite: bool) -> None:
    require(not path.is_dir(), f"{path} is a directory; an official checkpoint is a file")
    require(overwrite or not path.exists(), f"{path} exists; --overwrite replaces it")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one line."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path} cannot be written: {getattr(problem, 'strerror', None) or problem}") from problem


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to fill; it becomes ``path`` when the block ends, and vanishes if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
