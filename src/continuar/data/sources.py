"""Where images lie: an indexed list of encoded files with labels, in a deterministic order.

WebDataset tars: files that share a name up to its first dot are one sample.

1. Each tar's headers are read once; images are then read at their places, in any order. So tars must not be compressed.
2. A sample's label is ``KEY.cls`` (a number or a name), ``label`` of ``KEY.json``, or the first folder of its name.
3. Class names: those labels that are names, sorted; for numbers, the lines of ``classes.txt`` beside the tars, or ``class_name``
   of the JSON files, or the numbers themselves.

Which kind of source lies at a path.
"""

from __future__ import annotations

import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from continuar.errors import UserError, require

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class Source(ABC):
    """Encoded images by index.

    Attributes:
        labels: int64 [n]. classes: names in label order.
    """

    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of a file."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call it in a message."""


class FolderSource(Source):
    """ROOT/CLASS/.../IMAGE; class names are folder names, sorted."""

    def __init__(self, root: Path) -> None:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = {folder: _images_below(folder) for folder in folders}
        filled = [folder for folder in folders if files[folder]]
        loose = sum(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        require(
            bool(filled),
            f"{root} has no class folders with images ({loose} images lie loose in it); allowed: {root}/CLASS/IMAGE.png"
            if loose
            else f"{root} has no images; allowed: {root}/CLASS/IMAGE.png",
        )
        self.classes = tuple(folder.name for folder in filled)
        self._paths = [path for folder in filled for path in files[folder]]
        counts = [len(files[folder]) for folder in filled]
        self.labels = np.repeat(np.arange(len(filled), dtype=np.int64), counts)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def name(self, index: int) -> str:
        return str(self._paths[index])


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


class ParquetSource(Source):
    """Columns ``image`` (struct of bytes and path) and ``label`` (integers), as Hugging Face writes them."""

    def __init__(self, paths: list[Path]) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as problem:
            raise UserError("reading Parquet needs pyarrow: pip install 'continuar[train]'") from problem
        tables = []
        for path in paths:
            try:
                table = pq.read_table(path, columns=["image", "label"])
                table = table.cast(pa.schema([table.schema.field("image"), pa.field("label", pa.int64())], table.schema.metadata))
            except (pa.ArrowException, OSError, ValueError, KeyError) as problem:
                raise UserError(f"{path} is damaged or lacks the columns 'image' and 'label': {problem}") from problem
            image = table.schema.field("image").type
            require(
                pa.types.is_struct(image) and image.get_field_index("bytes") >= 0,
                f"{path}: the column 'image' is {image}; allowed: a struct with a field 'bytes'",
            )
            require(table["label"].null_count == 0, f"{path}: the column 'label' has empty entries")
            tables.append(table)
        self._files = [str(path) for path, table in zip(paths, tables, strict=True) for _ in range(table.num_rows)]
        self._rows = np.concatenate([np.arange(table.num_rows) for table in tables])
        self._images = pa.chunked_array([c for t in tables for c in t["image"].chunks], tables[0].schema.field("image").type)
        self.labels = np.concatenate([table["label"].to_numpy().astype(np.int64) for table in tables])
        require(len(self.labels) > 0, f"{paths[0]} has no images")
        names = _names_in(tables[0].schema.metadata or {})
        self.classes = names or tuple(str(i) for i in range(int(self.labels.max()) + 1))
        low, high = int(self.labels.min()), int(self.labels.max())
        require(
            low >= 0 and high < len(self.classes),
            f"{paths[0]}: labels run from {low} to {high}; allowed: 0 to {len(self.classes) - 1}",
        )

    def read(self, index: int) -> bytes:
        data = self._images[index].as_py()
        return (data or {}).get("bytes") or b""

    def name(self, index: int) -> str:
        return f"{self._files[index]} row {self._rows[index]}"


def _names_in(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Class names from the ``huggingface`` schema metadata, or none."""
    try:
        value: Any = json.loads(metadata.get(b"huggingface", b"null"))
        names = value["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(str(n) for n in names)


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


SPLITS = ("train", "validation", "val", "test")


def find_source(path: Path, split: str) -> Source:
    """The images at ``path``; see `load_images`.

    Raises:
        UserError: no such path, no images, or not of a known layout.
    """
    require(path.exists(), f"data path {path} does not exist")
    if path.is_file():
        require(path.suffix in (".parquet", ".tar"), f"data path {path} is a file; allowed: a .parquet or .tar file, or a folder")
        return _of_files([path])
    for suffix in (".parquet", ".tar"):
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            of_split = [p for p in files if split in p.name]
            require(
                bool(of_split) or not any(s in p.name for p in files for s in SPLITS),
                f"no {suffix} file of {path} is of the split '{split}' (there are {', '.join(p.name for p in files[:5])})",
            )
            return _of_files(of_split or files)
    return FolderSource(path / split if (path / split).is_dir() else path)


def _of_files(paths: list[Path]) -> Source:
    return ParquetSource(paths) if paths[0].suffix == ".parquet" else TarSource(paths)
