"""Checkpoints of a run: a saved model with the average, the optimizer and the step beside it, all checksummed.

The first process writes whole weights. Where they are sharded, every process writes its part into ``shards/`` instead, and the
run's last checkpoint has whole weights too. Each kind can be resumed as the other, on any number of processes.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continuar.checkpoints.sharded import read_shards, shards_of, write_shards
from continuar.checkpoints.store import (
    CONFIG,
    EMA,
    SHARDS,
    WEIGHTS,
    PipelineConfig,
    check_keys,
    current_names,
    write_tokenizer,
)
from continuar.distributed import SingleProcess, gathered_state, like, raise_on_all_ranks
from continuar.errors import RemoteRankError, UserError, require
from continuar.io import atomic_directory, checksum, read_json, read_tensors, temporary_path, write_json, write_tensors
from continuar.tokenizers import Tokenizer
from continuar.training.config import LoopConfig, TokenizerLoopConfig
from continuar.training.step import TrainStep

OPTIMIZER, AVERAGES, STATE = "optimizer.safetensors", "averages.safetensors", "state.json"
_OTHERS = {"averages": AVERAGES, "optimizer": OPTIMIZER}
_LOG = logging.getLogger("continuar")


def run_checkpoints(run_directory: Path) -> list[Path]:
    """The complete checkpoints of a run of any kind, newest first; one that is being written has a hidden name."""
    return sorted((run_directory / "checkpoints").glob("step-*"), reverse=True)


def save_checkpoint(run_directory: Path, file: PipelineConfig, tokenizer: Tokenizer, trainer: TrainStep, step: int) -> Path:
    """Writes ``checkpoints/step-NNNNNNNN`` (``step`` optimizer steps are done) and drops those that need not be kept.

    The last one of a run has whole weights even where they are sharded.

    Raises:
        OSError: in every process, if one cannot write; earlier checkpoints stay as they are.
    """
    parallel, loop = trainer.parallel, trainer.run.train
    destination = run_directory / "checkpoints" / f"step-{step:08d}"
    weights = {} if parallel.sharded and step < loop.steps else _weights(trainer)
    with _filled_together(destination, parallel) as temporary:
        if parallel.sharded:
            write_shards(temporary, _flat(_state(trainer)))
        with raise_on_all_ranks(parallel):
            if parallel.sharded:
                write_json(temporary / SHARDS / f"checksums-{parallel.rank:05d}.json", _sums(shards_of(temporary, parallel.rank)))
            if parallel.first:
                write_json(temporary / CONFIG, file)
                write_tokenizer(temporary, tokenizer)
                for name, tensors in weights.items():
                    write_tensors(temporary / name, tensors)
                if not parallel.sharded:
                    for group, name in _OTHERS.items():
                        if tensors := _state(trainer)[group]:
                            write_tensors(temporary / name, tensors)
                write_state(temporary, step, trainer.rollbacks, parallel.world)
    if parallel.first:
        drop_old(run_directory, loop)
    return destination


def write_state(checkpoint: Path, step: int, rollbacks: int, processes: int) -> None:
    """Writes ``state.json``: the counts of a run, and the checksums of the files that are there."""
    sums = _sums(p for p in sorted(checkpoint.iterdir()) if p.is_file())
    write_json(checkpoint / STATE, {"step": step, "rollbacks": rollbacks, "processes": processes, "checksums": sums})


def load_newest(run_directory: Path, trainer: Any, skip: int = 0, load: Callable[[Path, Any], None] | None = None) -> int:
    """Restores the newest intact checkpoint and returns its step; a damaged one is logged as an error and passed over.

    Args:
        trainer: gets the number of rollbacks; a `TrainStep` if ``load`` is not given.
        skip: leave out so many of the newest.
        load: called with (checkpoint, trainer) to restore everything else.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    found = run_checkpoints(run_directory)
    for checkpoint in found[skip:]:
        try:
            with raise_on_all_ranks(trainer.parallel):
                state = _checked(checkpoint, trainer.parallel)
        except RemoteRankError:
            continue
        except (UserError, OSError) as problem:
            _LOG.error("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
        else:
            (load or _load)(checkpoint, trainer)
            trainer.rollbacks = int(state.get("rollbacks", 0))
            return int(state["step"])
    require(not found, f"every checkpoint in {run_directory / 'checkpoints'} is damaged")
    return 0


def drop_old(run_directory: Path, loop: LoopConfig | TokenizerLoopConfig) -> None:
    """Leaves the newest checkpoints, the milestones, and nothing of a process that was killed while it wrote."""
    for old in run_checkpoints(run_directory)[loop.keep :]:
        if not loop.due(int(old.name.removeprefix("step-")), loop.milestone_images):
            shutil.rmtree(old)
    for torn in (run_directory / "checkpoints").glob(".step-*"):
        shutil.rmtree(torn)


def _checked(checkpoint: Path, parallel: SingleProcess) -> dict[str, Any]:
    """The checkpoint's ``state.json``, after each process compared its part of the files to their checksums."""
    state = read_json(checkpoint / STATE)
    require(isinstance(state, dict) and {"step", "checksums"} <= set(state), f"{checkpoint / STATE} lacks its entries")
    expected = {checkpoint / name: value for name, value in state["checksums"].items()}
    if (checkpoint / SHARDS).is_dir():
        for rank in range(state["processes"]):
            sums = read_json(checkpoint / SHARDS / f"checksums-{rank:05d}.json")
            expected |= {checkpoint / SHARDS / name: value for name, value in sums.items()}
    for path, value in list(expected.items())[parallel.rank :: parallel.world]:
        require(path.is_file() and checksum(path) == value, f"{path} is missing or its checksum differs")
    return state


@torch.no_grad()
def _load(checkpoint: Path, trainer: TrainStep) -> None:
    groups = _state(trainer)
    if (checkpoint / SHARDS).is_dir():
        read_shards(checkpoint, _flat(groups))
        return
    for group, file in ({"model": WEIGHTS, "ema": EMA} | _OTHERS).items():
        if not groups[group]:
            continue
        tensors = current_names(read_tensors(checkpoint / file))
        if group == "optimizer" and not tensors:
            continue  # a checkpoint of weights alone, made by hand: moments begin at zero
        check_keys(tensors, {k: v.shape for k, v in groups[group].items()}, str(checkpoint / file))
        for name, tensor in groups[group].items():
            tensor.copy_(like(tensors[name], tensor))


def _state(trainer: TrainStep) -> dict[str, dict[str, Tensor]]:
    """Everything a run is continued from, as the tensors that training uses, sharded where they are."""
    for p in (p for group in trainer.optimizer.param_groups for p in group["params"]):
        if not trainer.optimizer.state[p]:  # before the first step; AdamW itself would begin with the same zeros
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            trainer.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.model.state_dict(),
        "averages": trainer.averages.tensors,
        "optimizer": optimizer_tensors(trainer.optimizer),
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments and step counts, keyed ``index.name``; the optimizer's own, not copies."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def _weights(trainer: TrainStep) -> dict[str, dict[str, Tensor]]:
    """Whole weights by file: in the first process, to which all others send theirs where weights are sharded."""
    models = {WEIGHTS: trainer.model, EMA: trainer.ema.model}
    return {file: gathered_state(model, trainer.parallel) for file, model in models.items()}


def _sums(files: Iterable[Path]) -> dict[str, str]:
    return {p.name: checksum(p) for p in files}


@contextmanager
def _filled_together(destination: Path, parallel: SingleProcess) -> Iterator[Path]:
    """`atomic_directory` for several processes that fill the same one."""
    # Chosen by the first process, so that all know the temporary directory.
    writer = str(parallel.most(secrets.randbits(62) if parallel.first else 0))
    with ExitStack() as stack:
        with raise_on_all_ranks(parallel):
            if parallel.first:
                stack.enter_context(atomic_directory(destination, writer))
        yield temporary_path(destination, writer)
        with raise_on_all_ranks(parallel):
            stack.close()
