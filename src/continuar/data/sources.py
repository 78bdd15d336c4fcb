"""Where images lie: an indexed list of encoded files with labels, in a deterministic order."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
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
