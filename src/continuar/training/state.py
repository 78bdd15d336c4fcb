"""Checkpoints of a run: a saved model with the average, the optimizer and the step beside it, all checksummed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from torch import Tensor

from continuar.checkpoints.store import (
    CONFIG,
    EMA,
    WEIGHTS,
    ModelFile,
    atomic_directory,
    checksum,
    load_state,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_tokenizer,
)
from continuar.errors import UserError, require
from continuar.pipeline import newest_checkpoints
from continuar.tokenizers import Tokenizer
from continuar.training.step import TrainStep

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
_LOG = logging.getLogger("continuar")


def save_checkpoint(run_directory: Path, file: ModelFile, tokenizer: Tokenizer, trainer: TrainStep, step: int, keep: int) -> Path:
    """Writes ``checkpoints/step-NNNNNNNN`` (``step`` optimizer steps are done) and drops all but the newest ``keep``."""
    destination = run_directory / "checkpoints" / f"step-{step:08d}"
    with atomic_directory(destination) as temporary:
        write_json(temporary / CONFIG, file)
        write_tensors(temporary / WEIGHTS, trainer.model.state_dict())
        write_tensors(temporary / EMA, trainer.ema.model.state_dict())
        write_tokenizer(temporary, tokenizer)
        write_tensors(temporary / OPTIMIZER, optimizer_tensors(trainer.optimizer))
        sums = {p.name: checksum(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / STATE, {"step": step, "checksums": sums})
    for old in newest_checkpoints(run_directory)[keep:]:
        shutil.rmtree(old)
    return destination


def load_newest(run_directory: Path, trainer: TrainStep) -> int:
    """Restores the newest intact checkpoint and returns its step; a damaged one is said loudly and passed over.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    found = newest_checkpoints(run_directory)
    for checkpoint in found:
        try:
            return _load(checkpoint, trainer)
        except UserError as problem:
            _LOG.warning("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
    require(not found, f"every checkpoint in {run_directory / 'checkpoints'} is damaged")
    return 0


def _load(checkpoint: Path, trainer: TrainStep) -> int:
    state = read_json(checkpoint / STATE)
    require(isinstance(state, dict) and {"step", "checksums"} <= set(state), f"{checkpoint / STATE} lacks its entries")
    for name, expected in state["checksums"].items():
        path = checkpoint / name
        require(path.is_file() and checksum(path) == expected, f"{path} is missing or its checksum differs")
    load_state(trainer.model, read_tensors(checkpoint / WEIGHTS), str(checkpoint / WEIGHTS))
    load_state(trainer.ema.model, read_tensors(checkpoint / EMA), str(checkpoint / EMA))
    load_optimizer(trainer.optimizer, read_tensors(checkpoint / OPTIMIZER))
    return int(state["step"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments and step counts, keyed ``index.name``."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
