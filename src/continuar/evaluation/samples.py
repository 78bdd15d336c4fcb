"""Images to be measured: images on disk, read block by block so that any number of them fits, and images that a model generates.

An evaluation scores either kind; both have ``count``, ``size``, ``notes``, ``labels``, ``classes``, ``make`` and ``describe``.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from continuar.config import to_json
from continuar.data.decode import Unusable, decode
from continuar.data.loader import DIGITS, load_images
from continuar.data.sources import FolderSource, Source, find_source, is_image
from continuar.errors import UserError, require
from continuar.evaluation.networks import sha256_of_state
from continuar.pipeline import EngineName, Pipeline, resolve_engine
from continuar.sampling.fast.weights import Precision
from continuar.sampling.generate import make_plan

LOSSY = frozenset({".jpg", ".jpeg", ".webp"})
ARRAY = "arr_0"
"""The entry of an npz file that holds images, as ADM's suite stores samples and references."""


class Images(ABC):
    """Images of one size on disk, by index.

    Attributes:
        size: height and width. name: their path. notes: what a reader of the result should know.
    """

    size: tuple[int, int]
    name: str
    notes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, first: int, stop: int) -> np.ndarray:
        """Returns uint8 [stop - first, H, W, 3].

        Raises:
            UserError: an image that is unreadable or of another size.
        """

    @abstractmethod
    def identity(self) -> str:
        """Returns a text that changes with the files: with their names, sizes and times, not with their contents."""

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self)

    def make(self, first: int, number: int) -> np.ndarray:
        """Returns the images ``first``, ... ``first + number - 1``; fewer at the end."""
        return self.read(first, min(first + number, len(self)))

    def describe(self) -> dict[str, Any]:
        """Returns everything that decides the images, as JSON values."""
        size = list(self.size)
        return {"kind": "given", "path": self.name, "identity": self.identity(), "images": len(self), "size": size}

    def take(self, indices: list[int]) -> np.ndarray:
        """Returns single images, uint8 [len(indices), H, W, 3]."""
        return np.concatenate([self.read(i, i + 1) for i in indices])

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first index, block) of all images; the next block is read while the caller uses one."""
        spans = [(first, min(first + size, len(self))) for first in range(0, len(self), size)]
        # Reading waits for disks and decoders, measuring for the GPU.
        with ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(self.read, *spans[0])
            for (first, _), following in zip(spans, [*spans[1:], None], strict=True):
                block = waiting.result()
                if following is not None:
                    waiting = ahead.submit(self.read, *following)
                yield first, block


def open_images(path: str | Path, *, size: int | None = None, split: str = "train") -> Images:
    """Opens the images at ``path``.

    Args:
        path: a folder of images or of class folders, Parquet or WebDataset tars, an npz file with ``arr_0``, or "digits".
        size: every image is brought to this by ADM's centre crop, as for training; None leaves them as they are.
        split: which part, where the source has several.

    Raises:
        UserError: nothing there, no images, or images of several sizes.
    """
    if str(path) == DIGITS:
        return DigitImages(size)
    path = Path(path)
    require(path.exists(), f"{path} does not exist; allowed: a folder of images, a .parquet, .tar or .npz file")
    if path.suffix == ".npz":
        found = NpzImages(path)
        require(
            size is None or found.size == (size, size),
            f"{path} holds images of {hxw(found.size)} pixels, not of {size}x{size}; cropping is for the other kinds",
        )
        return found
    # Generated images lie loose in one folder; training data never does.
    loose = path.is_dir() and any(is_image(p) for p in path.iterdir())
    return EncodedImages(path, FlatFolder(path) if loose else find_source(path, split), size)


class FlatFolder(FolderSource):
    """ROOT/IMAGE, sorted by name, without classes."""

    def __init__(self, root: Path) -> None:
        self._paths = sorted(p for p in root.iterdir() if is_image(p))
        self.classes, self.labels = ("",), np.zeros(len(self._paths), np.int64)


class EncodedImages(Images):
    """Files of a source, decoded by a pool of threads.

    Training skips files that it cannot use, and here they stop: a score is of all images or of none.
    """

    def __init__(self, path: Path, source: Source, size: int | None) -> None:
        self._source, self._crop, self.name = source, size, str(path)
        require(len(source) > 0, f"{path} has no images")
        height, width = self._decode(0, None).shape[:2]
        self.size = (height, width) if size is None else (size, size)
        names = [source.name(i) for i in range(len(source))]
        self._files = names if isinstance(source, FolderSource) else _archives(path)
        lossy = {Path(name).suffix.lower() for name in names} & LOSSY
        if lossy:
            self.notes = (f"{path} holds {', '.join(sorted(lossy))} files: lossy compression changes features",)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, first: int, stop: int) -> np.ndarray:
        block = np.empty((stop - first, *self.size, 3), np.uint8)

        def one(index: int) -> None:
            pixels = self._decode(index, self._crop)
            require(
                pixels.shape[:2] == self.size,
                f"{self._source.name(index)} is of {hxw(pixels.shape[:2])} pixels, {self._source.name(0)} of {hxw(self.size)}; "
                "allowed: one size",
            )
            block[index - first] = pixels

        with ThreadPoolExecutor() as pool:
            list(pool.map(one, range(first, stop)))
        return block

    def _decode(self, index: int, size: int | None) -> np.ndarray:
        try:
            return decode(self._source.read(index), size)
        except Unusable as problem:
            raise UserError(f"{self._source.name(index)} cannot be used: {problem}") from problem

    def identity(self) -> str:
        return f"{len(self)} {hxw(self.size)} {_files_identity(self._files)}"


class DigitImages(Images):
    """scikit-learn's handwritten digits, which come with the package and lie in no folder."""

    def __init__(self, size: int | None = None) -> None:
        self._images = load_images(DIGITS, size=size or 8).images
        self.size, self.name = (8, 8), DIGITS

    def __len__(self) -> int:
        return len(self._images)

    def read(self, first: int, stop: int) -> np.ndarray:
        return self._images[first:stop]

    def identity(self) -> str:
        return hashlib.sha256(self._images.tobytes()).hexdigest()


class NpzImages(Images):
    """``arr_0`` of an npz file, uint8 [n, H, W, 3]. ADM's references hold gigabytes, so the array is never loaded whole."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, str(path)
        with npz_errors(path), zipfile.ZipFile(path) as archive:
            require(
                f"{ARRAY}.npy" in archive.namelist(),
                f"{path} has the entries {', '.join(npz_names(archive)) or 'none'}; allowed: {ARRAY}, uint8 [n, H, W, 3]",
            )
            with archive.open(f"{ARRAY}.npy") as file:
                shape, self._offset = _header(file, path)
        require(len(shape) == 4 and shape[3] == 3 and min(shape) >= 1, f"{path}: {ARRAY} is {shape}; allowed: [n, H, W, 3]")
        self._count, self.size = shape[0], (shape[1], shape[2])

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, stop: int) -> np.ndarray:
        each = self.size[0] * self.size[1] * 3
        with npz_errors(self._path), zipfile.ZipFile(self._path) as archive, archive.open(f"{ARRAY}.npy") as file:
            file.seek(self._offset + first * each)
            data = file.read((stop - first) * each)
            if len(data) < (stop - first) * each:
                raise EOFError(f"{ARRAY} ends early")
        # A bytearray, because torch warns of arrays that cannot be written to.
        return np.frombuffer(bytearray(data), np.uint8).reshape(stop - first, *self.size, 3)

    def identity(self) -> str:
        return f"{len(self)} {hxw(self.size)} {_files_identity([self.name])}"


@contextmanager
def npz_errors(path: Path) -> Iterator[None]:
    """Turns the exceptions of a damaged npz file into one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as problem:
        raise UserError(f"{path} is truncated or not an npz file: {problem}") from problem


def npz_names(archive: zipfile.ZipFile) -> list[str]:
    """Returns the entries of an npz file."""
    return [name.removesuffix(".npy") for name in archive.namelist()]


def _header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], int]:
    """Reads an array's shape and the offset of its data."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as problem:
        raise UserError(f"{path} is truncated or not an npz file: {problem}") from problem
    require(dtype == np.uint8 and not fortran, f"{path}: {ARRAY} is of {dtype}; allowed: uint8, in C order")
    return tuple(int(n) for n in shape), file.tell()


def _archives(path: Path) -> list[str]:
    return [str(p) for p in sorted(path.iterdir()) if p.suffix in (".parquet", ".tar")] if path.is_dir() else [str(path)]


def _files_identity(files: list[str]) -> str:
    # Hashing the contents of a million files would take as long as scoring them.
    digest = hashlib.sha256()
    for path in map(Path, files):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def hxw(size: tuple[int, ...]) -> str:
    """Formats (h, w) as "hxw"."""
    return "x".join(map(str, size))


class GeneratedSamples:
    """Images that a model generates. Image i has the seed ``seed + i`` and shows class i mod classes, whichever process makes it.

    Attributes:
        count: how many. size: height and width. labels: of each image, and ``classes`` their names; None and () without classes.

    Args:
        pipe: the model.
        count: a multiple of the number of classes, so that they are balanced.
        seed: of the first image.
        settings: sampling options by name that are not the model's defaults.
        engine, precision: as of `Pipeline.engine`; the report names the engine that "auto" chose.
        name, weights: for the report.

    Raises:
        UserError: no images, a count that the classes do not divide, or settings or an engine that the model cannot take.
    """

    def __init__(
        self,
        pipe: Pipeline,
        count: int,
        *,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        name: str = "",
        weights: str = "",
    ) -> None:
        classes = max(1, len(pipe.classes))
        require(count >= 2, f"images is {count}; allowed: 2 or more")
        less = count - count % classes
        near = f"{less} or {less + classes}" if less else f"{classes}"
        require(count % classes == 0, f"images is {count}, which {classes} classes do not divide; take {near}")
        options = pipe.defaults.override(**dict(settings or {}))
        # Both calls refuse what the model cannot take, before the work begins.
        make_plan(pipe.model.order, options, pipe.model.order.seq_len)
        pipe.engine(engine, precision)
        self.notes: tuple[str, ...] = ()
        self._pipe, self._seed, self._settings = pipe, seed, options.to_dict()
        self._running = {"engine": resolve_engine(pipe.model, engine), "precision": precision}
        self.name, self._weights = name, weights
        side = int(pipe.tokenizer.config.image_size)
        self.count, self.size, self.classes = count, (side, side), pipe.classes
        # Classes take turns, so that the first images of any number are about balanced.
        self.labels = np.arange(count) % classes if pipe.classes else None

    def make(self, first: int, number: int) -> np.ndarray:
        """Generates the images ``first``, ... ``first + number - 1``, uint8 [n, H, W, 3]; fewer at the end."""
        # The last batch is generated at full size, too, and cut: kernels round by batch shape, and engines capture one shape.
        index = range(first, first + number)
        labels = [i % len(self.classes) for i in index] if self.classes else None
        seeds = [self._seed + i for i in index]
        return self._pipe(labels, seeds, batch_size=number, **self._running, **self._settings)[: self.count - first]

    def describe(self) -> dict[str, Any]:
        """Returns everything that decides the images, as JSON values."""
        return {
            "kind": "generated",
            "model": self.name,
            "weights": self._weights,
            "model_sha256": sha256_of_state(self._pipe.model),
            "tokenizer_sha256": sha256_of_state(self._pipe.tokenizer),
            "model_config": to_json(self._pipe.config.model),
            "tokenizer_config": to_json(self._pipe.tokenizer.config),
            "settings": {**self._settings, **self._running},
            "seed": self._seed,
            "images": self.count,
            "size": list(self.size),
            "classes": len(self.classes),
        }


Samples = Images | GeneratedSamples
"""The two kinds that an evaluation scores."""
