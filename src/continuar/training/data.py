"""The endless stream of training batches, as a pure function of (seed, step): resuming needs no state.

Training batches from a cache of latents, as a pure function of (seed, step); the posterior is drawn on the training device.

Where a run's batches and its tokenizer come from: images, or a cache of latents.

1. Images are read into memory; what their tokenizer leaves open (a std, a codebook) is decided by them, and every batch is encoded
   anew.
2. A cache brings its tokenizer, which has to be the one that made it, and its classes; a batch is read from it and only tokenized.

The run that comes back has the tokenizer's config filled in. A resumed run keeps the tokenizer of its checkpoint either way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from continuar.checkpoints.store import read_pipeline_config, read_tokenizer
from continuar.checkpoints.tokenizers import Changes, load_tokenizer
from continuar.data.latent_cache import LatentCache, is_cache
from continuar.data.loader import ImageSet, load_images
from continuar.errors import UserError, require
from continuar.pipeline import find_model, newest_checkpoints
from continuar.tokenizers import CodebookConfig, LatentConfig, PixelConfig, Tokenizer, VAEConfig, VQConfig, fingerprint
from continuar.training.config import BaseRun, DataConfig


class IndexStream:
    """Permutations of 0..count-1 laid end to end; batch s is the stretch [s B, (s + 1) B)."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        require(count >= 1, "the data set is empty")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self._permutation

    def batch(self, step: int) -> np.ndarray:
        """Indices of batch ``step``, int64 [B]."""
        start, parts, left = step * self.batch_size, [], self.batch_size
        while left:
            epoch, offset = divmod(start, self.count)
            part = self._epoch_order(epoch)[offset : offset + left]
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return np.concatenate(parts)


class ImageStream:
    """Micro-batches of (tokens [B, N, D], labels [B]) on a device, from images that stay there as uint8.

    Args:
        batch_size: images per step.
        micro_batch: images per micro-batch, a divisor of the batch size; the whole batch if not given.
    """

    def __init__(
        self,
        images: ImageSet,
        tokenizer: Tokenizer,
        data: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        micro_batch: int | None = None,
    ) -> None:
        self._index = IndexStream(len(images), batch_size, seed)
        self._micro_batch = micro_batch or batch_size
        self._images = torch.from_numpy(images.images).to(device).permute(0, 3, 1, 2)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._tokenizer, self._data, self._device = tokenizer, data, device

    def batch(self, step: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Micro-batch ``slot`` of batch ``step``; augmentation draws from torch's default generator of the device."""
        first = slot * self._micro_batch
        index = torch.from_numpy(self._index.batch(step)[first : first + self._micro_batch])
        if self._device.type == "cuda":
            index = index.pin_memory()
        index = index.to(self._device, non_blocking=True)
        pixels = augment(self._images[index], self._data)
        images = pixels.float().div_(127.5).sub_(1)
        return self._tokenizer.tokenize(self._tokenizer.encode(images)), self._labels[index]


def augment(pixels_B3HW: Tensor, data: DataConfig) -> Tensor:
    """Random mirror images and shifts, as the config asks, each drawn per image."""
    batch, _, height, width = pixels_B3HW.shape
    device, pad = pixels_B3HW.device, data.crop_padding
    if not (data.flip or pad):
        return pixels_B3HW
    x = torch.arange(width, device=device).expand(batch, width)
    y = torch.arange(height, device=device).expand(batch, height)
    if data.flip:
        mirrored = torch.rand(batch, 1, device=device) < 0.5
        x = torch.where(mirrored, width - 1 - x, x)
    if pad:
        shift = torch.randint(-pad, pad + 1, (2, batch, 1), device=device)
        x, y = (x + shift[0]).clamp(0, width - 1), (y + shift[1]).clamp(0, height - 1)
    rows = torch.arange(batch, device=device)[:, None, None]
    return pixels_B3HW.permute(0, 2, 3, 1)[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def measure_std(images: ImageSet, encode: Callable[[Tensor], Tensor], block: int = 1024) -> tuple[float, float]:
    """(mean, std) of the encoded training images' values, streamed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, len(images), block):
        pixels = torch.from_numpy(images.images[first : first + block]).permute(0, 3, 1, 2)
        values = encode(pixels.float().div_(127.5).sub_(1)).double()
        count, total = count + values.numel(), total + values.sum().item()
        squares += values.square().sum().item()
    mean = total / count
    return mean, max(0.0, squares / count - mean**2) ** 0.5


_LOG = logging.getLogger("continuar")


class ReaderDied(RuntimeError):
    """The thread that reads ahead has ended without a batch; says why, where that is known."""


class Ahead:
    """One micro-batch that is being read by a thread of its own, which costs less than a tenth of a millisecond.

    Attributes:
        place: (step, slot) of the micro-batch.
    """

    def __init__(self, read: Callable[[int, int], tuple[Tensor, Tensor]], place: tuple[int, int]) -> None:
        self.place = place
        self._found: tuple[Tensor, Tensor] | None = None
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), name="latents")
        self._thread.start()

    def _run(self, read: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
        try:
            self._found = read(*self.place)
        except Exception as problem:
            self._problem = problem

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits for the thread.

        Raises:
            ReaderDied: it raised, or was ended from outside.
        """
        self._thread.join()
        if self._found is None:
            why = f"{type(self._problem).__name__}: {self._problem}" if self._problem else "its thread was ended"
            raise ReaderDied(why) from self._problem
        return self._found


class LatentStream:
    """Batches of (tokens, labels [B]) on a device; the next one is read while the device works on the last.

    Args:
        tokenizer: on the device; the one that made the cache (see `LatentCache.check_fingerprint`).
        flip: take the mirror image of half of the images, where the cache has it.
        micro_batch: images per micro-batch, a divisor of the batch size; the whole batch if not given.
        slots: the micro-batches of a step that will be asked for, one after another.
    """

    def __init__(
        self,
        cache: LatentCache,
        tokenizer: Tokenizer,
        *,
        flip: bool,
        batch_size: int,
        seed: int,
        device: torch.device,
        micro_batch: int | None = None,
        slots: range = range(1),
    ) -> None:
        self._micro_batch, self._slots = micro_batch or batch_size, slots
        self._cache, self._tokenizer, self._device = cache, tokenizer, device
        self._index, self._seed = IndexStream(len(cache), batch_size, seed), seed
        self._flip = flip and cache.info.views > 1
        self._looked = False
        self._ahead: Ahead | None = None

    def read(self, step: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Micro-batch ``slot`` of batch ``step`` as it is kept: (latents [m, ...], labels [m]) on the CPU."""
        rows = self._index.batch(step)
        views = np.random.default_rng((self._seed, step, 1)).integers(0, 2, len(rows)) if self._flip else np.zeros_like(rows)
        part = slice(slot * self._micro_batch, (slot + 1) * self._micro_batch)
        rows, views = rows[part], views[part]
        pin = self._device.type == "cuda"
        return self._cache.read(rows, views, pin=pin), torch.from_numpy(self._cache.labels[rows])

    @torch.no_grad()
    def batch(self, step: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Micro-batch ``slot`` of batch ``step``; the posterior draws from torch's default generator of the device.

        Raises:
            ReaderDied: it could not be read.
        """
        if self._ahead is not None and self._ahead.place != (step, slot):
            self._ahead.result()  # nobody wants it, but there is one reader at a time
            self._ahead = None
        latents, labels = (self._ahead or Ahead(self.read, (step, slot))).result()
        following = (step, slot + 1) if slot + 1 in self._slots else (step + 1, self._slots.start)
        self._ahead = Ahead(self.read, following)
        tokens = self._tokenizer.tokenize(latents.to(self._device, non_blocking=True))
        if not self._looked:
            self._look(tokens)
        return tokens, labels.to(self._device, non_blocking=True)

    def _look(self, tokens: Tensor) -> None:
        """Says once if tokens are far from unit standard deviation; a head that expects it would learn badly, and silently."""
        self._looked = True
        if tokens.is_floating_point() and not 0.9 <= (std := tokens.std().item()) <= 1.1:
            _LOG.warning(
                "tokens have std %.3f, not 1: `continuar tokenizer stats %s %s` measures the scale anew",
                std,
                self._cache.info.tokenizer,
                self._cache.directory,
            )


_LOG = logging.getLogger("continuar")
FITTED_IMAGES = 10_000
"""Training images that a tokenizer is fitted to at most, drawn by the run's seed."""


class Stream(Protocol):
    """Micro-batches as a function of the step."""

    def batch(self, step: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """(tokens, labels [m]) of micro-batch ``slot`` of batch ``step``, on the device."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on."""

    run: BaseRun
    """With the config of ``tokenizer``."""
    tokenizer: Tokenizer
    """On the CPU."""
    classes: tuple[str, ...]
    """Names in label order."""
    stream: Callable[[Tokenizer, torch.device, range], Stream]
    """The batches, given the tokenizer on the device that trains, and which micro-batches of a step will be asked for."""


def training_data(run: BaseRun, on_read: Callable[[int, int], None] | None = None, resumed: Path | None = None) -> TrainingData:
    """Opens what ``run.data`` names.

    Args:
        on_read: called with (images read, images in all) while images are read.
        resumed: the directory of a run that is continued.

    Raises:
        UserError: bad data; a tokenizer that cannot encode images, did not make the cache, or has no scale.
    """
    kept = newest_checkpoints(resumed) if resumed is not None else []
    return _from_cache(run, kept[:1]) if reads_cache(run.data) else _from_images(run, on_read, kept[:1])


def reads_cache(data: DataConfig) -> bool:
    """Whether the data is a cache of latents; the run's tokenizer is then the cache's, whatever the config says before."""
    return bool(data.path) and is_cache(Path(data.path))


def _from_cache(run: BaseRun, kept: list[Path]) -> TrainingData:
    cache, data, loop = LatentCache(run.data.path), run.data, run.train
    classes = cache.info.classes
    _check_classes(data, classes)
    require(data.crop_padding == 0, f"data.crop_padding is {data.crop_padding}; allowed with a cache of latents: 0")
    if data.flip and cache.info.views == 1:
        _LOG.warning("%s has no mirror images: data.flip changes nothing", data.path)
    tokenizer = cache_tokenizer(cache, data.tokenizer, kept)
    if tokenizer.spec != run.tokenizer.spec:
        _LOG.warning("the cache's tokens are %s; the run was written for %s", tokenizer.spec, run.tokenizer.spec)

    def stream(tokenizer: Tokenizer, device: torch.device, slots: range) -> Stream:
        sizes = {"batch_size": loop.batch_size, "micro_batch": loop.micro_batch or None, "slots": slots}
        return LatentStream(cache, tokenizer, flip=data.flip, seed=run.seed, device=device, **sizes)

    return TrainingData(replace(run, tokenizer=tokenizer.config), tokenizer, classes, stream)


def cache_tokenizer(cache: LatentCache, place: str, kept: list[Path]) -> Tokenizer:
    """The tokenizer that made a cache: of a checkpoint, if one is ``kept``, at ``place``, or where the cache remembers it.

    Raises:
        UserError: it is gone, did not make the cache, or has no scale.
    """
    info, where = cache.info, place or cache.info.tokenizer
    if kept:
        where = str(kept[0])
        tokenizer = read_tokenizer(kept[0], read_pipeline_config(kept[0]).tokenizer)
    else:
        # What a cache remembers is absolute, or the id of a hub.
        gone = not place and Path(where).is_absolute() and not Path(where).exists()
        require(
            not gone, f"the tokenizer of {cache.directory} was at {where}, which is gone; --data.tokenizer says where it is now"
        )
        ids = info.dtype == "int32" and len(info.shape) == 1
        tokenizer = load_tokenizer(where, Changes(info.image_size, ids=ids or None), warn=False)
    cache.check_fingerprint(fingerprint(tokenizer))
    unmeasured = isinstance(tokenizer.config, VAEConfig) and tokenizer.config.scale == 0
    require(not unmeasured, f"{where} has no scale yet: `continuar tokenizer stats {where} {cache.directory}` measures it")
    return tokenizer


def _from_images(run: BaseRun, on_read: Callable[[int, int], None] | None, kept: list[Path]) -> TrainingData:
    images = read_images(run, on_read)
    run = measured(run, images)
    if not kept and run.init and isinstance(run.tokenizer, CodebookConfig):
        kept = [find_model(run.init)]  # ids mean what they meant to the model that the run begins with
    tokenizer = read_tokenizer(kept[0], run.tokenizer) if kept else fitted(run, images)

    def stream(tokenizer: Tokenizer, device: torch.device, slots: range) -> Stream:
        loop = run.train
        return ImageStream(images, tokenizer, run.data, loop.batch_size, run.seed, device, loop.micro_batch or None)

    return TrainingData(run, tokenizer, images.classes, stream)


def read_images(run: BaseRun, on_read: Callable[[int, int], None] | None) -> ImageSet:
    """The run's training images; what was skipped is said."""
    tokenizer, data = run.tokenizer, run.data
    if isinstance(tokenizer, LatentConfig | VAEConfig | VQConfig):
        raise UserError(
            f"training on latents (tokenizer '{tokenizer.kind}') reads a cache of them, and data.path is '{data.path}'; "
            "`continuar cache DATA TOKENIZER DST` makes one, for --data.path DST"
        )
    require(bool(data.path), "data.path is empty; give a folder of class folders or a Parquet file (--data.path)")
    require(not data.tokenizer, f"data.tokenizer is {data.tokenizer}, but only a cache of latents has one, and {data.path} is none")
    images = load_images(
        data.path,
        size=tokenizer.image_size,
        split=data.split,
        max_skipped_share=data.max_skipped_share,
        progress=on_read,
    )
    if images.skipped:
        _LOG.warning("%d images could not be read and are skipped: %s", len(images.skipped), "; ".join(images.skipped[:5]))
    _check_classes(data, images.classes)
    return images


def measured(run: BaseRun, images: ImageSet) -> BaseRun:
    """The run with its tokenizer's std filled in from the images, where it has one; a given std that is far off is said."""
    tokenizer = run.tokenizer
    if not isinstance(tokenizer, PixelConfig):
        return run
    unit = replace(tokenizer, std=1.0).build()
    _, std = measure_std(images, lambda x: unit.tokenize(unit.encode(x)))
    require(std > 0, "all training images are of one colour: there is nothing to learn")
    if tokenizer.std == 0:
        return replace(run, tokenizer=replace(tokenizer, std=std))
    if not 0.9 < std / tokenizer.std < 1.1:
        _LOG.warning("tokens have std %.3f, not 1: tokenizer.std is %.4f, measured %.4f", std / tokenizer.std, tokenizer.std, std)
    return run


def fitted(run: BaseRun, images: ImageSet) -> Tokenizer:
    """The run's tokenizer, fitted to the images."""
    tokenizer = run.tokenizer.build()
    chosen = np.random.default_rng(run.seed).permutation(len(images))[:FITTED_IMAGES]
    tokenizer.fit(torch.from_numpy(images.images[chosen]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1))
    return tokenizer


def _check_classes(data: DataConfig, classes: tuple[str, ...]) -> None:
    require(data.classes in (0, len(classes)), f"the data has {len(classes)} classes, data.classes says {data.classes}")
