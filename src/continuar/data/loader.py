"""Decoding the images of a source: all of them into memory (`load_images`), or block by block (`image_blocks`).

An image that cannot be used is skipped, named and counted; a share of them above a limit is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from continuar.data.decode import Unusable, decode
from continuar.data.sources import Source, find_source
from continuar.errors import UserError, require

DIGITS = "digits"
"""Names scikit-learn's digits in place of a path."""


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
    """Reads every image of a source at size x size, by ADM's centre crop if it has another size.

    Args:
        source: a folder of class folders (ROOT/CLASS/IMAGE), a Parquet file or a WebDataset tar or a folder of them, or "digits".
        size: pixels.
        split: which part, if the source has several (sub-folders or file names "train", "val", "test").
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
    gib = count * size * size * 3 / 2**30
    require(
        gib <= max_memory_gib,
        f"{count} images of {size}x{size} take {gib:.1f} GiB of memory; allowed: {max_memory_gib}; try a smaller size",
    )
    images, usable = np.empty((count, size, size, 3), np.uint8), np.zeros(count, bool)
    skipped: list[str] = []
    # In blocks, which keep few futures waiting: Ctrl-C then stops without delay.
    for block in image_blocks(found, range(count), size):
        images[block.index], usable[block.index] = block.images, True
        skipped += block.skipped
        if progress is not None:
            progress(block.chosen[-1] + 1, count)
    check_skipped(skipped, count, max_skipped_share)
    return ImageSet(images[usable] if skipped else images, found.labels[usable], found.classes, tuple(skipped))


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
    return ImageSet(np.repeat(grey, 3, axis=-1), np.asarray(labels, np.int64), class_names(DIGITS))


@dataclass(frozen=True)
class Block:
    """Some images of a source, without those that cannot be used."""

    images: np.ndarray
    """uint8 [n, H, W, 3]"""
    index: np.ndarray
    """int64 [n], their places in the source."""
    chosen: tuple[int, ...]
    """The places that were asked for: those of ``index`` and of the skipped images."""
    skipped: tuple[str, ...]
    """One line per image that cannot be used: "name: reason"."""


def decode_block(source: Source, chosen: Sequence[int], size: int, pool: ThreadPoolExecutor) -> Block:
    """Decodes the chosen images in threads, in the order asked for."""
    images = np.empty((len(chosen), size, size, 3), np.uint8)

    def one(place: int) -> str | None:
        try:
            images[place] = decode(source.read(chosen[place]), size)
        except (Unusable, OSError) as problem:
            return f"{source.name(chosen[place])}: {problem}"
        return None

    # Threads, not processes: Pillow releases the interpreter's lock while it decodes.
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
        for following in parts[1:]:
            found = waiting.pop().result()
            waiting.append(ahead.submit(decode_block, source, following, size, pool))
            yield found
        yield from (last.result() for last in waiting)


def check_skipped(skipped: Sequence[str], count: int, max_skipped_share: float) -> None:
    """Refuses skipped images if they are more than a share of ``count``, or all of them; the message names the first.

    Raises:
        UserError: too many.
    """
    share = len(skipped) / count
    few = "; ".join(skipped[:3])
    require(
        share <= max_skipped_share and len(skipped) < count,
        f"{len(skipped)} of {count} images cannot be used ({share:.1%}; allowed: {max_skipped_share:.1%}): {few}",
    )
