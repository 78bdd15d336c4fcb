"""Files that the package writes and reads: text, JSON, configs, tensors, checkpoints of ``torch.save``, directories.

1. Writing goes to a temporary name beside the destination, reaches the disk (fsync), and is renamed. A reader sees the old file or
   the new one, never a part, also after ``kill -9``. A directory is filled and swapped in the same way.
2. Reading runs nothing that a file holds: pickles are read with ``weights_only=True``.
3. A file that is missing, damaged or of another format is a `UserError` that names it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pickle
import re
import secrets
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from continuar.config import from_json, rename_old_fields, to_json
from continuar.errors import UserError, require

T = TypeVar("T")
_TOKEN = secrets.token_hex(4)


def temporary_path(destination: Path, writer: str = "") -> Path:
    """The hidden name under which a process fills what becomes ``destination``.

    Args:
        writer: a name that several processes share when they fill one directory together; by default, this process's own.
    """
    # Process ids repeat on the hosts of a shared file system, and the token repeats in forked processes.
    return destination.with_name(f".{destination.name}.{writer or f'{os.getpid()}-{_TOKEN}'}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes ``path`` when the block ends, and is removed if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """`atomic_path`, opened for writing bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        yield handle


@contextmanager
def atomic_directory(destination: Path, writer: str = "") -> Iterator[Path]:
    """Yields an empty directory to fill; it replaces ``destination`` when the block ends, and is removed if the block raises.

    Args:
        writer: see `temporary_path`.
    """
    destination = Path(os.path.abspath(destination))  # "." has no name
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(destination, writer)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if destination.exists():
            _exchange(temporary, destination)
        else:
            temporary.rename(destination)
    finally:
        # After an exchange, the old directory is here.
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _exchange(new: Path, old: Path) -> None:
    """Swaps two directories."""
    # rename() cannot replace a directory that has files, and a kill between two renames would leave nothing at ``old``. Linux swaps
    # both names in one step: renameat2(AT_FDCWD, new, AT_FDCWD, old, RENAME_EXCHANGE).
    if sys.platform == "linux" and ctypes.CDLL(None).renameat2(-100, os.fsencode(new), -100, os.fsencode(old), 2) == 0:
        return
    # Other systems, and file systems without the call (NFS): two renames; a kill between them leaves the old directory hidden.
    aside = old.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write ``path`` into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path} cannot be written: {getattr(problem, 'strerror', None) or problem}") from problem


def check_file(path: Path, overwrite: bool) -> None:
    """Refuses to write an official checkpoint over a directory, or over a file without leave."""
    require(not path.is_dir(), f"{path} is a directory; an official checkpoint is a file")
    require(overwrite or not path.exists(), f"{path} exists; --overwrite replaces it")


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step; ``value`` may hold configs."""
    write_text(path, json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    require(path.is_file(), f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}") from problem


def read_config(kind: type[T], path: Path) -> T:
    """The config of class ``kind`` in a JSON file, also if an older version wrote it.

    Raises:
        UserError: the file is missing, not JSON, or does not hold such a config.
    """
    return from_json(kind, rename_old_fields(read_json(path)), str(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Replaces a safetensors file in one step. Tensors are copied to the CPU, floating-point ones as ``dtype`` if given.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    on_cpu = {k: v.detach().to("cpu", dtype if dtype and v.is_floating_point() else v.dtype) for k, v in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in on_cpu.items()}, temporary)
        except SafetensorError as problem:
            raise OSError(f"{path.name} cannot be written: {problem}") from problem
        # safetensors creates files that only their owner may read; weights are shared like any other file.
        temporary.chmod(0o644)


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


def checksum(path: Path) -> str:
    """CRC-32 of a file, as eight hexadecimal digits: against truncation and flipped bits, not against malice."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ONLY_PLAIN = "only plain tensors, numbers and argparse.Namespace are read from checkpoint files"
# torch's reader raises different types depending on where the damage is; these were found by flipping bytes.
_DAMAGED = (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError)
_DAMAGED += (AttributeError, AssertionError, struct.error)


class _Callback:
    """Stands for the class by which older Lightning keys the state of its callbacks; nothing of it is used."""


_INERT = [
    argparse.Namespace,
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Callback, "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"),
]


def load_torch_file(path: Path, expected: str = "an official checkpoint file (.pth)") -> Any:
    """The content of a torch file, mapped from the disk where possible; no object that could run code is made.

    Args:
        expected: the kind of file that the caller needs, for the message.

    Raises:
        UserError: missing, a directory, damaged, of another format, or with anything but plain values in it.
    """
    require(not path.is_dir(), f"{path} is a directory; {expected} is expected")
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from problem
    require(bool(start), f"{path} is empty")
    zipped = start.startswith(_ZIP)
    require(zipped or start == _LEGACY, f"{path} is {_format_name(start)}, not a checkpoint of torch.save; {_ONLY_PLAIN}")
    try:
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings():
            # torch warns of the pickle protocols and storage classes of old files; only errors matter here.
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


def _format_name(start: bytes) -> str:
    if start[8:9] == b"{":
        return "a safetensors file"
    return "a plain pickle" if start[:1] == b"\x80" else f"a file that begins with {start!r}"
