"""Files of weights: safetensors and JSON, written so that a reader sees all of it or none.

A *saved model* is a directory with ``config.json`` (`PipelineConfig`), ``model.safetensors`` and, where the tokenizer has a state,
``tokenizer.safetensors``; a training checkpoint is the same with ``ema.safetensors`` and the trainer's state beside it. Weights may
be stored in bfloat16; they are computed with in float32.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from continuar.config import from_json, rename_old_fields, to_json
from continuar.errors import UserError, require
from continuar.models.autoregressive import ModelConfig
from continuar.models.dit import DiTConfig
from continuar.sampling.generate import SamplingOptions
from continuar.tokenizers import Tokenizer, TokenizerConfig

FORMAT = 1
_RENAMED = {"class_embedding.weight": "condition.embedding"}
"""Weights that older files hold under another name."""
CONFIG, WEIGHTS, EMA, TOKENIZER = "config.json", "model.safetensors", "ema.safetensors", "tokenizer.safetensors"
SHARDS = "shards"
"""The folder of a checkpoint whose weights several processes wrote; see `checkpoints.shards`."""


@dataclass(frozen=True)
class PipelineConfig:
    """What ``config.json`` of a saved model holds: all that is needed to generate but the weights."""

    model: ModelConfig | DiTConfig
    tokenizer: TokenizerConfig
    classes: tuple[str, ...]
    """Class names in label order; empty for an unconditional model."""
    sampling: SamplingOptions
    """The settings the model was found best with; head options left out are the head's defaults."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"format {self.format} of a saved model; this version reads {FORMAT}")
        require(len(self.classes) == self.model.classes, f"{len(self.classes)} class names for {self.model.classes} classes")
        require(
            self.tokenizer.spec == self.model.tokens,
            f"the tokenizer gives {self.tokenizer.spec}, the model takes {self.model.tokens}",
        )
        object.__setattr__(self, "sampling", self.sampling.for_head(self.model))


@contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """Yields a directory to fill with files; it becomes ``destination`` when the block ends, and vanishes if the block raises.

    What stood at ``destination`` is replaced, or put back if the last step fails.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_directory(destination, os.getpid())
    old = destination.parent / f".{destination.name}.{os.getpid()}.old"
    for stale in (temporary, old):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if destination.exists():
            destination.rename(old)
        try:
            temporary.rename(destination)
        except OSError:
            if old.exists():
                old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_directory(destination: Path, process: int) -> Path:
    """Where the process of that id fills what will become ``destination``."""
    return destination.parent / f".{destination.name}.{process}.tmp"


def is_replaceable(directory: Path) -> bool:
    """Whether a saved model may be written there: nothing, an empty directory, or another saved model (not a training run)."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    names = {p.name for p in directory.iterdir()}
    return not names or {CONFIG, WEIGHTS} <= names <= {CONFIG, WEIGHTS, TOKENIZER}


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file at once."""
    write_text(path, json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    require(path.is_file(), f"{path} does not exist")
    try:
        return rename_old_fields(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}") from problem


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes tensors as safetensors, on the CPU, floating ones as ``dtype`` if given.

    Raises:
        OSError: they cannot be written, because the disk is full, say.
    """
    on_cpu = {k: v.detach().to("cpu", dtype if dtype and v.is_floating_point() else v.dtype) for k, v in tensors.items()}
    try:
        save_file({k: v.contiguous() for k, v in on_cpu.items()}, path)
    except SafetensorError as problem:
        raise OSError(f"{path.name} cannot be written: {problem}") from problem
    # safetensors creates files that only their owner may read; weights are shared like any other file.
    path.chmod(0o644)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        UserError: the file is missing, empty, truncated or of another format.
    """
    require(path.is_file(), f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as problem:
        raise UserError(f"{path} is truncated or not a safetensors file: {problem}") from problem


def load_state(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads weights into a module; every key and shape must fit, names as of older files being read as today's.

    Raises:
        UserError: lists what is missing, unexpected or of another shape.
    """
    tensors = current_names(tensors)
    check_keys(tensors, {k: v.shape for k, v in module.state_dict().items()}, where)
    module.load_state_dict(tensors)


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by today's names, whatever version wrote them."""
    return {_RENAMED.get(k, k): v for k, v in tensors.items()}


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer's state beside a model, if it has one."""
    state = tokenizer.state_dict()
    if state:
        write_tensors(directory / TOKENIZER, state)


def read_tokenizer(directory: Path, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a saved model, with its state if it has one.

    Raises:
        UserError: its state is missing, unreadable, or does not fit.
    """
    tokenizer = config.build()
    if tokenizer.state_dict():
        load_state(tokenizer, read_tensors(directory / TOKENIZER), str(directory / TOKENIZER))
    return tokenizer


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: str, shown: int = 8) -> None:
    """Refuses a state dict whose keys or shapes are not exactly the expected ones, and names them.

    Raises:
        UserError: one line with what is missing, unexpected or of another shape.
    """

    def listed(names: list[str]) -> str:
        return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")

    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k])}"
        for k in expected
        if k in state and state[k].shape != expected[k]
    ]
    parts = [
        ("missing", [k for k in expected if k not in state]),
        ("unexpected", [k for k in state if k not in expected]),
        ("of another shape", shapes),
    ]
    problems = "; ".join(f"{name}: {listed(keys)}" for name, keys in parts if keys)
    require(not problems, f"{where} does not fit the model: {problems}")


def checksum(path: Path) -> str:
    """CRC-32 of a file, as eight hexadecimal digits: against truncation and flipped bits, not against malice."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def read_pipeline_config(directory: Path) -> PipelineConfig:
    """The config of a saved model.

    Raises:
        UserError: missing, unreadable, or not of this format.
    """
    path = directory / CONFIG
    require(path.is_file(), f"{directory} is not a saved model: it has no {CONFIG}")
    value = read_json(path)
    require(isinstance(value, dict) and "model" in value, f"{path} is not the config of a saved model")
    return from_json(PipelineConfig, value, str(path))
