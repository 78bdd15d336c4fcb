"""WebDataset tars: files that share a name up to its first dot are one sample.

1. Each tar's headers are read once; images are then read at their places, in any order. So tars must not be compressed.
2. A sample's label is ``KEY.cls`` (a number or a name), ``label`` of ``KEY.json``, or the first folder of its name.
3. Class names: those labels that are names, sorted; for numbers, the lines of ``classes.txt`` beside the tars, or ``class_name``
   of the JSON files, or the numbers themselves.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from continuar.data.sources import SUFFIXES, Source
from continuar.errors import UserError, require

CLASSES = "classes.txt"


@dataclass
class _Sample:
    """What a tar holds under one key."""

    key: str
    image: tuple[str, int, int] | None = None
    """(name, offset, size) of the image's bytes."""
    label: str | int | None = None
    class_name: str | None = None


@dataclass
class _Found:
    """Images of all tars, in order."""

    images: list[tuple[int, str, int, int]] = field(default_factory=list)
    """(which tar, name, offset, size)"""
    labels: list[str | int] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)


class TarSource(Source):
    """See the module's docstring."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        found = _Found()
        for number, path in enumerate(self._paths):
            _index(path, number, found)
        where = self._paths[0]
        require(bool(found.images), f"{where} has no images; allowed: KEY.jpg beside KEY.cls, or CLASS/KEY.jpg")
        self._images = found.images
        kinds = {type(label) for label in found.labels}
        require(len(kinds) == 1, f"{where}: some labels are numbers and some are names; allowed: one or the other")
        if kinds == {str}:
            self.classes = tuple(sorted(set(map(str, found.labels))))
            place = {name: i for i, name in enumerate(self.classes)}
            self.labels = np.array([place[str(label)] for label in found.labels], np.int64)
        else:
            self.labels = np.array(found.labels, np.int64)
            self.classes = _names(where.parent / CLASSES, found.class_names, int(self.labels.max()) + 1)
        low, high = int(self.labels.min()), int(self.labels.max())
        require(
            low >= 0 and high < len(self.classes),
            f"{where}: labels run from {low} to {high}; allowed: 0 to {len(self.classes) - 1}",
        )

    def read(self, index: int) -> bytes:
        tar, _, offset, size = self._images[index]
        with self._paths[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        tar, name, _, _ = self._images[index]
        return f"{self._paths[tar]} {name}"


def _index(path: Path, number: int, found: _Found) -> None:
    """Adds the samples of a tar that have an image."""
    samples: dict[str, _Sample] = {}
    try:
        _check_end(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _add(samples, tar, member, path)
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise UserError(f"{path} is truncated, compressed or not a tar: {problem}; allowed: a plain .tar") from problem
    for sample in samples.values():
        if sample.image is None:
            continue
        if sample.label is None:
            raise UserError(f"{path}: {sample.key} has no label; allowed: KEY.cls, 'label' of KEY.json, or CLASS/KEY.jpg")
        found.images.append((number, *sample.image))
        found.labels.append(sample.label)
        if isinstance(sample.label, int) and sample.class_name is not None:
            found.class_names.setdefault(sample.label, sample.class_name)


def _check_end(path: Path) -> None:
    """A whole tar ends with blocks of zeros; a reader does not notice if they are missing."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read() != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


def _add(samples: dict[str, _Sample], tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Notes one file of a tar."""
    folder, _, file = member.name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    if not stem:
        return  # hidden
    key = f"{folder}/{stem}" if folder else stem
    sample = samples.setdefault(key, _Sample(key))
    if f".{suffix.lower()}" in SUFFIXES:
        sample.image = (member.name, member.offset_data, member.size)
        if sample.label is None and folder:
            sample.label = folder.split("/")[0]
    elif suffix in ("cls", "json"):
        reader = tar.extractfile(member)
        assert reader is not None
        text = reader.read().decode("utf-8", "replace").strip()
        if suffix == "cls":
            require(bool(text), f"{path}: {member.name} is empty; allowed: a number or a name")
            sample.label = _label(text)
        else:
            _add_json(sample, text, f"{path}: {member.name}")


def _add_json(sample: _Sample, text: str, where: str) -> None:
    try:
        values: Any = json.loads(text)
    except ValueError as problem:
        raise UserError(f"{where} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict) or "label" not in values:
        return
    label, name = values["label"], values.get("class_name")
    plain = isinstance(label, str | int) and not isinstance(label, bool)
    require(plain, f"{where}: label is {label!r}; allowed: a number or a name")
    sample.label = label
    sample.class_name = name if isinstance(name, str) else None


def _label(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdecimal() else text


def _names(beside: Path, told: dict[int, str], count: int) -> tuple[str, ...]:
    """Names for labels that are numbers."""
    if beside.is_file():
        return tuple(line.strip() for line in beside.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(told.get(i, str(i)) for i in range(count))
