"""Batches of images without labels, as a pure function of (seed, step): from memory, or decoded when they are needed."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from continuar.autoencoders.config import ImagesConfig
from continuar.data.blocks import decode_block
from continuar.data.find import find_source
from continuar.data.images import ImageSet, check_skipped, load_images
from continuar.data.sources import Source
from continuar.devices import GIB
from continuar.errors import require
from continuar.training.config import DataConfig
from continuar.training.stream import IndexStream, augment

_LOG = logging.getLogger("continuar")


class ImageBatches(ABC):
    """Images [B, 3, H, W] in [-1, 1] on a device.

    Args:
        batch_size: of all processes together.
        part: which images of every batch are asked for; all if not given.
    """

    def __init__(self, count: int, batch_size: int, seed: int, flip: bool, device: torch.device, part: range | None = None) -> None:
        self._index, self._part = IndexStream(count, batch_size, seed), part or range(batch_size)
        self._augmentation, self._device = DataConfig(flip=flip), device

    @abstractmethod
    def pixels(self, step: int) -> Tensor:
        """uint8 [B, 3, H, W] of the part of batch ``step``, on the device."""

    @abstractmethod
    def first(self, count: int) -> Tensor:
        """The first images of the data, in [-1, 1]: to look at."""

    @property
    def count(self) -> int:
        """Images in all."""
        return self._index.count

    def rows(self, step: int) -> np.ndarray:
        """Where the images of the part of batch ``step`` stand in the data, int64 [B]."""
        return self._index.batch(step)[self._part.start : self._part.stop]

    def plain(self, step: int) -> Tensor:
        """The part of batch ``step`` without mirror images."""
        return _signed(self.pixels(step))

    def batch(self, step: int) -> Tensor:
        """The part of batch ``step``; mirror images draw from torch's default generator of the device."""
        return _signed(augment(self.pixels(step), self._augmentation))


class MemoryBatches(ImageBatches):
    """Images that stay on the device as uint8."""

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int, flip: bool, device: torch.device, part: range | None = None
    ) -> None:
        super().__init__(len(images), batch_size, seed, flip, device, part)
        self._images = torch.from_numpy(images.images).to(device).permute(0, 3, 1, 2)

    def pixels(self, step: int) -> Tensor:
        return self._images[torch.from_numpy(self.rows(step)).to(self._device)]

    def first(self, count: int) -> Tensor:
        return _signed(self._images[:count])


class DecodedBatches(ImageBatches):
    """Images decoded when they are needed, one batch ahead; one that cannot be used gives its place to the next that can."""

    def __init__(
        self,
        source: Source,
        size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        max_skipped_share: float,
        device: torch.device,
        part: range | None = None,
    ) -> None:
        super().__init__(len(source), batch_size, seed, flip, device, part)
        self._source, self._size, self._max_skipped_share = source, size, max_skipped_share
        self._skipped: dict[str, None] = {}
        self._pool, self._reader = ThreadPoolExecutor(), ThreadPoolExecutor(1, "images")
        self._ahead: tuple[int, Future[np.ndarray]] | None = None

    def pixels(self, step: int) -> Tensor:
        expected, future = self._ahead or (None, None)
        found = future.result() if future is not None else None  # also waits for a batch that nobody wants: one reader at a time
        images = found if found is not None and expected == step else self._read(step)
        self._ahead = step + 1, self._reader.submit(self._read, step + 1)
        return torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)

    def first(self, count: int) -> Tensor:
        images = self._decode(np.arange(min(count, len(self._source))))
        return _signed(torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2))

    def _read(self, step: int) -> np.ndarray:
        return self._decode(self.rows(step))

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3]"""
        images = np.empty((len(rows), self._size, self._size, 3), np.uint8)
        wanted, places = rows, np.arange(len(rows))
        while len(places):
            block = decode_block(self._source, wanted.tolist(), self._size, self._pool)
            self._note(block.skipped)
            good = np.isin(wanted, block.index)
            images[places[good]] = block.images
            wanted, places = (wanted[~good] + 1) % len(self._source), places[~good]
        return images

    def _note(self, skipped: tuple[str, ...]) -> None:
        for line in skipped:
            if line not in self._skipped:
                _LOG.warning("skipped: %s", line)
                self._skipped[line] = None
        if skipped:
            check_skipped(list(self._skipped), len(self._source), self._max_skipped_share)


def open_images(
    config: ImagesConfig,
    size: int,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    part: range | None = None,
    on_read: Callable[[int, int], None] | None = None,
) -> ImageBatches:
    """The run's images; in memory if they fit.

    Args:
        batch_size, part: see `ImageBatches`.
        on_read: called with (images read, images in all) while they are read into memory.

    Raises:
        UserError: no such data, or too many unusable images.
    """
    require(bool(config.path), "data.path is empty; give a folder, Parquet files or tars (--data.path)")
    share = config.max_skipped_share
    if config.path != "digits":
        source = find_source(Path(config.path), config.split)
        if len(source) * size * size * 3 > config.max_memory_gib * GIB:
            return DecodedBatches(source, size, batch_size, seed, config.flip, share, device, part)
    images = load_images(config.path, size=size, split=config.split, max_skipped_share=share, progress=on_read)
    for line in images.skipped[:5]:
        _LOG.warning("skipped: %s", line)
    return MemoryBatches(images, batch_size, seed, config.flip, device, part)


def _signed(pixels_B3HW: Tensor) -> Tensor:
    return pixels_B3HW.float().div_(127.5).sub_(1)
