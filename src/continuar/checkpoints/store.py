"""Files of weights: safetensors and JSON, written so that a reader sees all of it or none.

A *saved model* is a directory with ``config.json`` (`PipelineConfig`), ``model.safetensors`` and, where the tokenizer has a state,
``tokenizer.safetensors``; a training checkpoint is the same with ``ema.safetensors`` and the trainer's state beside it. Weights may
be stored in bfloat16; they are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from continuar.config import from_json, rename_old_fields
from continuar.errors import require
from continuar.io import read_json, read_tensors, write_tensors
from continuar.models.autoregressive import ModelConfig
from continuar.models.dit import DiTConfig
from continuar.sampling.options import SamplingOptions
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


def check_replaceable(directory: Path, needed: str = WEIGHTS, config: str = CONFIG, what: str = "saved model") -> None:
    """Refuses to write a saved model anywhere but to a new or empty directory, or over another one.

    Raises:
        UserError: something else is there; also a training run, which has a config but no weights beside it.
    """
    is_file = directory.exists() and not directory.is_dir()
    require(not is_file, f"{directory} is a file; a {what} is a directory. It is not a {what}; choose another directory")
    names = {p.name for p in directory.iterdir()} if directory.exists() else set()
    free = not names or {config, needed} <= names <= {config, needed, TOKENIZER}
    require(free, f"{directory} exists and is not a {what}; choose another directory")


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


def read_pipeline_config(directory: Path) -> PipelineConfig:
    """The config of a saved model.

    Raises:
        UserError: missing, unreadable, or not of this format.
    """
    path = directory / CONFIG
    require(path.is_file(), f"{directory} is not a saved model: it has no {CONFIG}")
    value = read_json(path)
    require(isinstance(value, dict) and "model" in value, f"{path} is not the config of a saved model")
    return from_json(PipelineConfig, rename_old_fields(value), str(path))


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors each in storage of its own, as file formats need them; copied only where it is shared."""
    seen: set[int] = set()
    own = {}
    for k, v in state.items():
        storage = v.untyped_storage()
        shared = storage.nbytes() != v.numel() * v.element_size() or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        own[k] = v.clone(memory_format=torch.contiguous_format) if shared else v.contiguous()
    return own
