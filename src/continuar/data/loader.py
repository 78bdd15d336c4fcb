"""Images of a source decoded block by block: for sources larger than memory, with the next block on its way.

Images in memory: from folders of class folders, Hugging Face style Parquet, WebDataset tars, or scikit-learn's digits.

A file that cannot be used is skipped, named and counted; more than a set share of them stops.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from continuar.data.decode import Unusable, decode
from continuar.data.sources import Source, find_source
from continuar.devices import GIB
from continuar.errors import UserError, require


@dataclass(frozen=True)
class Block:
    """Some consecutive images of a source, without those that cannot be used."""

    images: np.ndarray
    """uint8 [n, H, W, 3]"""
    index: np.ndarray
    """int64 [n], their places in the source."""
    chosen: tuple[int, ...]
    """The places that were asked for: those of ``index`` and the skipped."""
    skipped: tuple[str, ...]
    """One line per image that cannot be used: "name: reason"."""

    @property
    def asked(self) -> int:
        """How many were asked for."""
        return len(self.chosen)


def decode_block(source: Source, chosen: Sequence[int], size: int, pool: ThreadPoolExecutor) -> Block:
    """Decodes in threads (Pillow works outside the interpreter's lock), in the order asked for."""
    images = np.empty((len(chosen), size, size, 3), np.uint8)

    def one(place: int) -> str | None:
        try:
            images[place] = decode(source.read(chosen[place]), size)
        except (Unusable, OSError) as problem:
            return f"{source.name(chosen[place])}: {problem}"
        return None

    # What Pillow warns of (odd tags, sizes beyond its own limit) either does no harm or makes the image unusable, which is said.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reasons = list(pool.map(one, range(len(chosen))))
    usable = np.array([reason is None for reason in reasons], bool)
    skipped = tuple(reason for reason in reasons if reason is not None)
    index = np.asarray(chosen, np.int64)
    return Block(images if usable.all() else images[usable], index[usable], tuple(chosen), skipped)


def image_blocks(source: Source, chosen: Sequence[int], size: int, block: int = 256) -> Iterator[Block]:
    """Blocks of the chosen images in order; the next one is decoded while the caller works on the last."""
    parts = [chosen[first : first + block] for first in range(0, len(chosen), block)]
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(decode_block, source, part, size, pool) for part in parts[:1]]
        for following in (*parts[1:], None):
            found = waiting.pop().result() if waiting else None
            if following is not None:
                waiting.append(ahead.submit(decode_block, source, following, size, pool))
            if found is not None:
                yield found


DIGITS = "digits"
"""What names scikit-learn's digits where a path would stand."""


@dataclass(frozen=True)
class ImageSet:
    """Decoded images in memory."""

    images: np.ndarray
    """uint8 [n, H, W, 3]"""
    labels: np.ndarray
    """int64 [n], 0..len(classes)-1"""
    classes: tuple[str, ...]
    """Class names in label order."""
    skipped: tuple[str, ...] = ()
    """One line per file that could not be used: "name: reason"."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, count: int | None) -> ImageSet:
        """The first ``count`` images; all of them for None."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])


def load_images(
    source: str | Path,
    *,
    size: int,
    split: str = "train",
    max_skipped_share: float = 0.01,
    max_memory_gib: float = 32.0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Reads every image of a source at size x size, by ADM's centre crop where it is not that size.

    Args:
        source: a folder of class folders (ROOT/CLASS/IMAGE), a Parquet file or a WebDataset tar or a folder of them, or "digits".
        size: pixels.
        split: which part, where the source has several (sub-folders or file names "train", "val", "test").
        max_skipped_share: of files that cannot be used, 0..1.
        max_memory_gib: the most that decoded images may take.
        progress: called with (images read, images in all).

    Raises:
        UserError: no such source, no images, too many unusable ones, or too much memory.
    """
    require(size >= 1, f"image size is {size}; allowed: 1 or more")
    if str(source) == DIGITS:
        require(size == 8, f"image size is {size}; the digits are 8x8")
        return load_digits()
    found = find_source(Path(source), split)
    count = len(found)
    needed = count * size * size * 3
    require(
        needed <= max_memory_gib * GIB,
        f"{count} images of {size}x{size} take {needed / GIB:.1f} GiB of memory; allowed: {max_memory_gib}; try a smaller size",
    )
    return _decode_all(found, size, max_skipped_share, progress)


def class_names(source: str | Path, split: str = "train") -> tuple[str, ...]:
    """The class names of a source, without decoding its images."""
    return tuple(str(i) for i in range(10)) if str(source) == DIGITS else find_source(Path(source), split).classes


def load_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey values 0..16 scaled to 0..255."""
    try:
        from sklearn import datasets
    except ImportError as problem:
        raise UserError("the digits come with scikit-learn: pip install 'continuar[demo]'") from problem
    pixels, labels = datasets.load_digits(return_X_y=True)
    grey = np.round(np.asarray(pixels).reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ImageSet(np.repeat(grey, 3, axis=-1), np.asarray(labels, np.int64), tuple(str(i) for i in range(10)))


def _decode_all(source: Source, size: int, max_skipped_share: float, progress: Callable[[int, int], None] | None) -> ImageSet:
    """Decodes in the source's order. Blocks keep few futures waiting, so that Ctrl-C stops at once."""
    count = len(source)
    images, usable = np.empty((count, size, size, 3), np.uint8), np.zeros(count, bool)
    skipped: list[str] = []
    done = 0
    for block in image_blocks(source, range(count), size):
        images[block.index], usable[block.index] = block.images, True
        skipped += block.skipped
        done += block.asked
        if progress is not None:
            progress(done, count)
    if skipped:
        check_skipped(skipped, count, max_skipped_share)
        images = images[usable]
    return ImageSet(images, source.labels[usable], source.classes, tuple(skipped))


def check_skipped(skipped: Sequence[str], count: int, max_skipped_share: float) -> None:
    """Stops if more than a share of ``count`` images, or all of them, cannot be used; the message names the first."""
    share = len(skipped) / count
    few = "; ".join(skipped[:3])
    require(
        share <= max_skipped_share and len(skipped) < count,
        f"{len(skipped)} of {count} images cannot be used ({share:.1%}; allowed: {max_skipped_share:.1%}): {few}",
    )
