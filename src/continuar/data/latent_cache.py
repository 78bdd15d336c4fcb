"""Format and reading of caches of latents: a directory of few large files, read in any order.

    cache.json        tokenizer, source, shapes, classes: `CacheInfo`
    shard-00000.bin   rows of [views, *shape], the image and its mirror image, as plain little-endian numbers
    shard-00000.json  labels of the rows, skipped images, checksum: `ShardInfo`; written after the numbers are complete

A row holds posterior moments or ids, not tokens: the posterior is drawn anew at every use, on the device that trains.
`continuar.data.cache_build` makes and checks caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from continuar.errors import require
from continuar.io import read_config

INDEX = "cache.json"
FORMAT = 1
DType = Literal["bfloat16", "float32", "int32"]
Precision = Literal["float32", "bfloat16"]
_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True)
class CacheInfo:
    """Content of ``cache.json``, which all shards have in common."""

    fingerprint: str
    """Hash of the tokenizer's encoder, from `continuar.tokenizers.fingerprint`."""
    tokenizer: str
    """Path or hub id of the tokenizer."""
    source: str
    """Path of the images."""
    split: str
    """Part of the images."""
    image_size: int
    """Side of the images in pixels."""
    count: int
    """Images in the source, unusable ones included."""
    shard_images: int
    """Images of the source per shard."""
    views: int
    """2: the image and its mirror image; 1: only the image."""
    shape: tuple[int, ...]
    """Shape of one latent: [2C, h, w] moments, [C, h, w] vectors, or [N] ids."""
    dtype: DType
    """Type of the numbers in the shards."""
    precision: Precision
    """Precision of the encoder's arithmetic."""
    classes: tuple[str, ...]
    """Names in label order."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"format {self.format} of a cache of latents; this version reads {FORMAT}")
        for name in ("count", "shard_images"):
            require(getattr(self, name) >= 1, f"{name} of a cache is {getattr(self, name)}; allowed: 1 or more")
        require(self.views in (1, 2), f"views of a cache is {self.views}; allowed: 1 or 2")
        require(bool(self.shape) and min(self.shape) >= 1, f"shape of a cache is {self.shape}; allowed: 1 or more each")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return _DTYPES[self.dtype]

    @property
    def shards(self) -> int:
        """Number of shards of the complete cache."""
        return -(-self.count // self.shard_images)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's row, all views."""
        return self.views * int(np.prod(self.shape)) * self.torch_dtype.itemsize

    def chosen(self, shard: int) -> range:
        """The places in the source whose images a shard holds."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.count))


@dataclass(frozen=True)
class ShardInfo:
    """Content of ``shard-NNNNN.json``."""

    labels: tuple[int, ...]
    """One per row."""
    missing: tuple[int, ...]
    """Places in the source whose images could not be used."""
    skipped: tuple[str, ...]
    """The reasons, one line each."""
    checksum: str
    """CRC-32 of ``shard-NNNNN.bin``."""

    def index(self, chosen: range) -> np.ndarray:
        """The place in the source of each row."""
        return np.setdiff1d(np.asarray(chosen, np.int64), np.asarray(self.missing, np.int64))


def shard_path(directory: Path, shard: int, suffix: Literal["bin", "json"]) -> Path:
    """A file of a shard."""
    return directory / f"shard-{shard:05d}.{suffix}"


def is_cache(path: Path) -> bool:
    """Whether a directory holds a cache of latents, complete or not."""
    return (path / INDEX).is_file()


def read_info(directory: Path) -> CacheInfo:
    """The content of ``cache.json``.

    Raises:
        UserError: not a cache, or damaged.
    """
    path = directory / INDEX
    require(path.is_file(), f"{directory} is not a cache of latents: it has no {INDEX}")
    return read_config(CacheInfo, path)


def read_shard(directory: Path, info: CacheInfo, shard: int) -> ShardInfo:
    """The content of a shard's JSON, checked against the size of its numbers.

    Raises:
        UserError: the shard is not complete yet, or damaged.
    """
    path, numbers = shard_path(directory, shard, "json"), shard_path(directory, shard, "bin")
    require(path.is_file(), f"{path} does not exist: the shard is not complete yet")
    found = read_config(ShardInfo, path)
    require(
        len(found.labels) + len(found.missing) == len(info.chosen(shard)),
        f"{path} has {len(found.labels)} labels and {len(found.missing)} skipped images; {len(info.chosen(shard))} are expected",
    )
    expected = len(found.labels) * info.row_bytes
    size = numbers.stat().st_size if numbers.is_file() else 0
    require(size == expected, f"{numbers} has {size} bytes; {expected} are expected (--rebuild makes it anew)")
    return found


class LatentCache:
    """A complete cache, open for reading.

    Attributes:
        info: content of cache.json. labels: int64 [n]. index: int64 [n], the place of each row in the source.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.info = info = read_info(self.directory)
        lacking = [s for s in range(info.shards) if not shard_path(self.directory, s, "json").is_file()]
        require(
            not lacking,
            f"{self.directory} is not complete: {info.shards - len(lacking)} of {info.shards} shards are there; "
            "the same `continuar cache` command makes the others",
        )
        shards = [read_shard(self.directory, info, s) for s in range(info.shards)]
        self.labels = np.concatenate([np.asarray(s.labels, np.int64) for s in shards])
        self.index = np.concatenate([s.index(info.chosen(i)) for i, s in enumerate(shards)])
        self._first = np.cumsum([0, *(len(s.labels) for s in shards)])
        require(len(self.labels) > 0, f"{self.directory} has no images")

    def __len__(self) -> int:
        return len(self.labels)

    def check_fingerprint(self, fingerprint: str) -> None:
        """Refuses a tokenizer that did not make this cache.

        Raises:
            UserError: it has another fingerprint.
        """
        require(
            fingerprint == self.info.fingerprint,
            f"{self.directory} was made by another tokenizer (fingerprint {self.info.fingerprint[:12]}, not {fingerprint[:12]}), "
            f"which was at {self.info.tokenizer}",
        )

    def read(self, rows: np.ndarray, views: np.ndarray | int = 0, *, pin: bool = False) -> Tensor:
        """Latents [B, *shape] of the given rows in the cache's dtype, on the CPU.

        Args:
            rows: int64 [B], 0..n-1.
            views: the view of each: 0 the image, 1 its mirror image.
            pin: use page-locked memory, from which copies to a GPU are asynchronous.

        Raises:
            OSError: a shard is gone, cannot be read, or has become shorter.
        """
        rows = np.asarray(rows, np.int64)
        views = np.broadcast_to(np.asarray(views, np.int64), rows.shape)
        out = torch.empty(len(rows), *self.info.shape, dtype=self.info.torch_dtype, pin_memory=pin)
        if len(rows) == 0:
            return out
        bytes_BR = out.view(len(rows), -1).view(torch.uint8).numpy()
        shard = np.searchsorted(self._first, rows, "right") - 1
        starts = ((rows - self._first[shard]) * self.info.views + views) * bytes_BR.shape[1]
        order = np.argsort(shard, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            self._read_shard(shard_path(self.directory, int(shard[places[0]]), "bin"), bytes_BR, places, starts)
        return out

    def _read_shard(self, path: Path, bytes_BR: np.ndarray, places: np.ndarray, starts: np.ndarray) -> None:
        """Fills the given places of a batch."""
        # No memory map: if the disk cannot deliver a page of one, the process is killed by SIGBUS.
        with path.open("rb", buffering=0) as file:
            for place in places:
                file.seek(start := int(starts[place]))
                if file.readinto(bytes_BR[place].data) != bytes_BR.shape[1]:
                    raise OSError(f"{path} ends before byte {start + bytes_BR.shape[1]:,}")

    def blocks(self, size: int = 1024) -> Iterator[Tensor]:
        """All latents of all views in order, [b, *shape] at a time."""
        for first in range(0, len(self), size):
            rows = np.arange(first, min(first + size, len(self)))
            for view in range(self.info.views):
                yield self.read(rows, view)
