"""Files of ``torch.save``, read so that nothing they hold is run, and written so that a reader sees all or nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from continuar.errors import UserError, require

_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ONLY_PLAIN = "only plain tensors, numbers and argparse.Namespace are read from checkpoint files"
# What torch's reader raises for a damaged file depends on where the damage is; found by flipping bytes.
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
        expected: what should be there, for the message.

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
    require(zipped or start == _LEGACY, f"{path} is {_kind(start)}, not a checkpoint of torch.save; {_ONLY_PLAIN}")
    try:
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings():
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


def check_file(path: Path, overwrite: bool) -> None:
    """Refuses to write over a directory, or over a file without leave."""
    require(not path.is_dir(), f"{path} is a directory; an official checkpoint is a file")
    require(overwrite or not path.exists(), f"{path} exists; --overwrite replaces it")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one line."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise UserError(f"{path} cannot be written: {getattr(problem, 'strerror', None) or problem}") from problem


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
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
