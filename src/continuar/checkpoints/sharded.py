"""Tensors that several processes hold together, in safetensors files beside one another: `torch.distributed.checkpoint`.

Every process writes what it has. The header of a file says where in its tensor each piece belongs, as JSON, so that any number of
processes can read it back, and a single one can join the pieces; nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from continuar.checkpoints.store import SHARDS, check_keys
from continuar.errors import UserError, require


def write_shards(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``checkpoint/shards``; all processes of the group together, each its part of sharded tensors.

    Raises:
        OSError: in every process, if one cannot write.
    """
    writer = HuggingFaceStorageWriter(str(checkpoint / SHARDS), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, no_dist=not torch.distributed.is_initialized())
    except CheckpointException as problem:
        rank, (error, _) = next(iter(problem.failures.items()))
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"process {rank} could not write its shard: {error}", str(checkpoint)) from problem


def shards_of(checkpoint: Path, rank: int) -> list[Path]:
    """The files that process ``rank`` wrote; none if it had nothing to write."""
    return sorted((checkpoint / SHARDS).glob(f"shard-{rank + 1:05d}-*"))


def read_shards(checkpoint: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Overwrites tensors, sharded or whole, by those in ``checkpoint/shards``.

    Args:
        alone: this process reads by itself; else all processes of the group do, if there is a group.

    Raises:
        UserError: what is there does not fit or cannot be read.
    """
    sizes, folder = _sizes(checkpoint), checkpoint / SHARDS
    check_keys({k: v for k, v in sizes.items() if k in tensors}, {k: v.shape for k, v in tensors.items()}, str(folder))
    reader, alone = HuggingFaceStorageReader(str(folder)), alone or not torch.distributed.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
            load(dict(tensors), storage_reader=reader, no_dist=alone)
    except CheckpointException as problem:
        raise UserError(f"{folder} cannot be read: {next(iter(problem.failures.values()))[0]}") from problem


def read_full(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, joined, on the CPU, without it."""
    tensors = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in _sizes(checkpoint).items() if k.startswith(prefix)}
    read_shards(checkpoint, tensors, alone=True)
    return {k.removeprefix(prefix): v for k, v in tensors.items()}


def _sizes(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor's name, shape and dtype, as tensors that hold nothing."""
    folder = checkpoint / SHARDS
    require(folder.is_dir(), f"{folder} does not exist")
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as problem:  # safetensors raises its own errors for what is truncated
        raise UserError(f"{folder} is truncated or damaged: {problem}") from problem
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
