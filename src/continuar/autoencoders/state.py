"""Checkpoints of a tokenizer's run: a saved tokenizer with what its training needs beside it, checksummed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from torch import Tensor, nn

from continuar.autoencoders.step import TokenizerStep
from continuar.checkpoints.store import (
    TOKENIZER,
    atomic_directory,
    checksum,
    load_state,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from continuar.checkpoints.tokenizers import TOKENIZER_CONFIG, TokenizerFile
from continuar.errors import SaidElsewhere, UserError, require
from continuar.training.parallel import together
from continuar.training.state import load_optimizer, optimizer_tensors

STATE = "state.json"
_LOG = logging.getLogger("continuar")


def newest_checkpoints(run_directory: Path) -> list[Path]:
    """The complete checkpoints of a run directory, newest first."""
    return sorted((p.parent for p in run_directory.glob(f"checkpoints/step-*/{STATE}")), reverse=True)


def save_checkpoint(run_directory: Path, trainer: TokenizerStep, step: int, keep: int) -> Path:
    """Writes ``checkpoints/step-NNNNNNNN`` (``step`` optimizer steps are done) and drops all but the newest ``keep``.

    The first process does it, and the others wait.
    """
    destination = run_directory / "checkpoints" / f"step-{step:08d}"
    with together(trainer.parallel):
        if trainer.parallel.first:
            _write(destination, trainer, step)
            for old in newest_checkpoints(run_directory)[keep:]:
                shutil.rmtree(old)
    return destination


def load_newest(run_directory: Path, trainer: TokenizerStep) -> int:
    """Restores the newest intact checkpoint and returns its step; a damaged one is said loudly and passed over, by all processes.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    found = newest_checkpoints(run_directory)
    for checkpoint in found:
        try:
            with together(trainer.parallel):
                step = _load(checkpoint, trainer)
        except SaidElsewhere:
            continue
        except (UserError, OSError) as problem:
            _LOG.error("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
        else:
            return step
    with together(trainer.parallel):
        require(not found, f"every checkpoint in {run_directory / 'checkpoints'} is damaged")
    return 0


def _write(destination: Path, trainer: TokenizerStep, step: int) -> None:
    with atomic_directory(destination) as temporary:
        for name, tensors in _files(trainer).items():
            write_tensors(temporary / name, tensors)
        # The config is not part of the sums: a scale measured later is kept in it.
        sums = {p.name: checksum(p) for p in sorted(temporary.iterdir())}
        write_json(temporary / TOKENIZER_CONFIG, TokenizerFile(trainer.tokenizer.config))
        write_json(temporary / STATE, {"step": step, "checksums": sums})


def _modules(trainer: TokenizerStep) -> dict[str, nn.Module]:
    modules = {
        TOKENIZER: trainer.tokenizer,
        "discriminator.safetensors": trainer.discriminator,
        "codebook.safetensors": trainer.codebook,
    }
    return {name: module for name, module in modules.items() if module is not None}


def _files(trainer: TokenizerStep) -> dict[str, dict[str, Tensor]]:
    files = {name: module.state_dict() for name, module in _modules(trainer).items()}
    return files | {name: optimizer_tensors(optimizer) for name, optimizer in _optimizers(trainer).items()}


def _optimizers(trainer: TokenizerStep) -> dict:
    optimizers = {
        "optimizer.safetensors": trainer.optimizer,
        "discriminator_optimizer.safetensors": trainer.discriminator_optimizer,
    }
    return {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None}


def _load(checkpoint: Path, trainer: TokenizerStep) -> int:
    state = read_json(checkpoint / STATE)
    require(isinstance(state, dict) and {"step", "checksums"} <= set(state), f"{checkpoint / STATE} lacks its entries")
    for name, expected in state["checksums"].items():
        path = checkpoint / name
        require(path.is_file() and checksum(path) == expected, f"{path} is missing or its checksum differs")
    for name, module in _modules(trainer).items():
        load_state(module, read_tensors(checkpoint / name), str(checkpoint / name))
    for name, optimizer in _optimizers(trainer).items():
        load_optimizer(optimizer, read_tensors(checkpoint / name))
    return int(state["step"])
