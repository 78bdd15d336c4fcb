"""Images on disk: an indexed list of encoded files with labels, in a deterministic order.

`find_source` tells three layouts apart by the path:

| layout | class | label of an image |
|---|---|---|
| folders ROOT/CLASS/.../IMAGE | `FolderSource` | the name of the folder CLASS |
| Parquet files | `ParquetSource` | the integer in the column ``label`` |
| WebDataset tars | `TarSource` | the number or name in KEY.cls, ``label`` in KEY.json, or the first folder of the image's name |

Labels that are names are numbered in sorted order. Labels that are numbers are named by the ``huggingface`` metadata of a Parquet
file, by the lines of ``classes.txt`` beside the tars, by ``class_name`` in KEY.json, or else by the numbers themselves.
"""

from __future__ import annotations

import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from continuar.errors import UserError, require

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = ("train", "validation", "val", "test")


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
        """The bytes of an encoded image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The image's name in messages."""


def find_source(path: Path, split: str) -> Source:
    """The images at ``path``; see `continuar.data.loader.load_images`.

    Raises:
        UserError: no such path, no images, or not of a known layout.
    """
    layouts = {".parquet": ParquetSource, ".tar": TarSource}
    require(path.exists(), f"data path {path} does not exist")
    if path.is_file():
        require(path.suffix in layouts, f"data path {path} is a file; allowed: a .parquet or .tar file, or a folder")
        return layouts[path.suffix]([path])
    for suffix, layout in layouts.items():
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            of_split = [p for p in files if split in p.name]
            # Files that name no split at all belong to every split.
            require(
                bool(of_split) or not any(s in p.name for p in files for s in SPLITS),
                f"no {suffix} file of {path} is of the split '{split}' (there are {', '.join(p.name for p in files[:5])})",
            )
            return layout(of_split or files)
    return FolderSource(path / split if (path / split).is_dir() else path)


def number_labels(labels: Sequence[str | int], where: Path, names: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers int64 [n], and the class names in their order.

    Args:
        labels: all names, which are numbered in sorted order, or all numbers.
        names: the names of numbers; by default the numbers themselves.

    Raises:
        UserError: names mixed with numbers, or a number without a name.
    """
    require(len({type(label) for label in labels}) == 1, f"{where}: some labels are numbers and some are names; allowed: one kind")
    if isinstance(labels[0], str):
        classes = tuple(sorted({str(label) for label in labels}))
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[str(label)] for label in labels], np.int64), classes
    numbers = np.array(labels, np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    classes = tuple(names) or tuple(str(i) for i in range(high + 1))
    require(low >= 0 and high < len(classes), f"{where}: labels run from {low} to {high}; allowed: 0 to {len(classes) - 1}")
    return numbers, classes


class FolderSource(Source):
    """ROOT/CLASS/.../IMAGE, sorted by name; hidden files and folders are left out."""

    def __init__(self, root: Path) -> None:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = [(folder.name, path) for folder in folders for path in sorted(folder.rglob("*")) if is_image(path)]
        loose = sum(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        problem = f"no class folders with images ({loose} images lie loose in it)" if loose else "no images"
        require(bool(found), f"{root} has {problem}; allowed: {root}/CLASS/IMAGE.png")
        self._paths = [path for _, path in found]
        self.labels, self.classes = number_labels([name for name, _ in found], root)

    def read(self, index: int) -> bytes:
        return self._paths[index].read_bytes()

    def name(self, index: int) -> str:
        return str(self._paths[index])


def is_image(path: Path) -> bool:
    """True for a visible file whose name ends as an image's."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


class ParquetSource(Source):
    """Columns ``image`` (struct of bytes and path) and ``label`` (integers), as Hugging Face writes them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            import pyarrow as pa
        except ImportError as problem:
            raise UserError("reading Parquet needs pyarrow: pip install 'continuar[train]'") from problem
        tables = [_read_parquet(path) for path in paths]
        self._places = [(path, row) for path, table in zip(paths, tables, strict=True) for row in range(table.num_rows)]
        require(bool(self._places), f"{paths[0]} has no images")
        self._images = pa.chunked_array([c for t in tables for c in t["image"].chunks], tables[0].schema.field("image").type)
        labels = [label for table in tables for label in table["label"].to_pylist()]
        self.labels, self.classes = number_labels(labels, paths[0], _huggingface_names(tables[0].schema.metadata or {}))

    def read(self, index: int) -> bytes:
        data = self._images[index].as_py()
        return (data or {}).get("bytes") or b""

    def name(self, index: int) -> str:
        path, row = self._places[index]
        return f"{path} row {row}"


def _read_parquet(path: Path) -> Any:
    """The columns ``image`` and ``label`` (cast to int64) of a file, as a pyarrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["image", "label"])
        table = table.cast(pa.schema([table.schema.field("image"), pa.field("label", pa.int64())], table.schema.metadata))
    except (pa.ArrowException, OSError, ValueError, KeyError) as problem:
        raise UserError(f"{path} is damaged or lacks the columns 'image' and 'label': {problem}") from problem
    image = table.schema.field("image").type
    fits = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    require(fits, f"{path}: the column 'image' is {image}; allowed: a struct with a field 'bytes'")
    require(table["label"].null_count == 0, f"{path}: the column 'label' has empty entries")
    return table


def _huggingface_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Class names in the ``huggingface`` metadata of a Parquet schema, or none."""
    try:
        value: Any = json.loads(metadata.get(b"huggingface", b"null"))
        return tuple(map(str, value["info"]["features"]["label"]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()


CLASSES = "classes.txt"


@dataclass
class _Sample:
    """The files of one key in a tar."""

    image: tuple[Path, str, int, int] | None = None
    """(tar, name, offset, size) of the image's bytes."""
    label: str | int | None = None
    class_name: str | None = None


class TarSource(Source):
    """WebDataset tars: files that share a name up to its first dot are one sample.

    Each tar's headers are read once; images are then read at their offsets, in any order. So tars must not be compressed.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._images: list[tuple[Path, str, int, int]] = []
        labels: list[str | int] = []
        names: dict[int, str] = {}
        for path in paths:
            for key, sample in _read_tar(path).items():
                if sample.image is None:
                    continue
                if sample.label is None:
                    raise UserError(f"{path}: {key} has no label; allowed: KEY.cls, 'label' of KEY.json, or CLASS/KEY.jpg")
                self._images.append(sample.image)
                labels.append(sample.label)
                if isinstance(sample.label, int) and sample.class_name is not None:
                    names.setdefault(sample.label, sample.class_name)
        require(bool(labels), f"{paths[0]} has no images; allowed: KEY.jpg beside KEY.cls, or CLASS/KEY.jpg")
        classes = paths[0].parent / CLASSES
        if classes.is_file():
            listed = [line.strip() for line in classes.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            listed = [names.get(i, str(i)) for i in range(1 + max((n for n in labels if isinstance(n, int)), default=-1))]
        self.labels, self.classes = number_labels(labels, paths[0], listed)

    def read(self, index: int) -> bytes:
        tar, _, offset, size = self._images[index]
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        tar, name, _, _ = self._images[index]
        return f"{tar} {name}"


def _read_tar(path: Path) -> dict[str, _Sample]:
    """The samples of a tar by key, in its order."""
    samples: dict[str, _Sample] = {}
    try:
        _check_end(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = file.partition(".")
                if not member.isfile() or not stem:  # the stem of a hidden file is empty
                    continue
                sample = samples.setdefault(f"{folder}/{stem}".removeprefix("/"), _Sample())
                if f".{suffix.lower()}" in SUFFIXES:
                    sample.image = (path, member.name, member.offset_data, member.size)
                    if sample.label is None and folder:
                        sample.label = folder.split("/")[0]
                elif suffix in ("cls", "json"):
                    reader = tar.extractfile(member)
                    assert reader is not None
                    text = reader.read().decode("utf-8", "replace").strip()
                    read = _read_cls if suffix == "cls" else _read_label_json
                    read(sample, text, f"{path}: {member.name}")
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise UserError(f"{path} is truncated, compressed or not a tar: {problem}; allowed: a plain .tar") from problem
    return samples


def _check_end(path: Path) -> None:
    # A complete tar ends with blocks of zeros; tarfile does not notice if they are missing.
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read() != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


def _read_cls(sample: _Sample, text: str, where: str) -> None:
    require(bool(text), f"{where} is empty; allowed: a number or a name")
    sample.label = int(text) if text.lstrip("-").isdecimal() else text


def _read_label_json(sample: _Sample, text: str, where: str) -> None:
    try:
        values: Any = json.loads(text)
    except ValueError as problem:
        raise UserError(f"{where} is not valid JSON: {problem}") from problem
    if not isinstance(values, dict) or "label" not in values:
        return
    label, name = values["label"], values.get("class_name")
    plain = isinstance(label, str | int) and not isinstance(label, bool)
    require(plain, f"{where}: label is {label!r}; allowed: a number or a name")
    sample.label, sample.class_name = label, name if isinstance(name, str) else None
