"""Images of a source decoded block by block: for sources larger than memory, with the next block on its way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from continuar.data.decode import Unusable, decode
from continuar.data.sources import Source


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
