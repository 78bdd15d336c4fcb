"""Official MAR checkpoint files (``.pth``), both ways. The key layout itself is in `mar`.

1. Reading runs nothing that a file holds: tensors, plain values and ``argparse.Namespace`` are all that is let in.
2. Sizes come from the tensors' shapes. What no shape tells (attention heads, dropout, the autoencoder) comes from the
   file's ``args``; whatever else ``args`` says must agree with the shapes.
3. Writing is the same backwards, so that official -> ours -> official gives back every bit.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
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
from continuar.checkpoints.torch_files import atomic_file, check_file, load_torch_file, written
from continuar.errors import UserError, require
from continuar.tokenizers import LatentConfig

Weights = Literal["ema", "raw"]
_ENTRY = {"ema": "model_ema", "raw": "model"}


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
    with written(destination), atomic_directory(destination) as temporary:
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
    check_file(destination, overwrite)
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
    content = load_torch_file(path)
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
    check_file(path, overwrite)
    args = official_args(file)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in file.model.build().state_dict().items()}
    for state in (model, ema):
        check_keys(state, shapes, "the source")
    layout = to_official(model, file.model)
    average = layout if ema is model else to_official(ema, file.model)
    with written(path), atomic_file(path) as handle:
        torch.save({"model": layout, "model_ema": average, "args": argparse.Namespace(**args)}, handle)
    return len(layout)


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
