"""Where a run's batches and its tokenizer come from: images, or a cache of latents.

1. Images are read into memory; what their tokenizer leaves open (a std, a codebook) is decided by them, and every batch is encoded
   anew.
2. A cache brings its tokenizer, which has to be the one that made it, and its classes; a batch is read from it and only tokenized.

The run that comes back has the tokenizer's config filled in. A resumed run keeps the tokenizer of its checkpoint either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from continuar.checkpoints.store import read_model_file, read_tokenizer
from continuar.checkpoints.tokenizers import Changes, fingerprint, load_tokenizer
from continuar.data.images import ImageSet, load_images
from continuar.data.latents import LatentCache, is_cache
from continuar.errors import UserError, require
from continuar.pipeline import find_model, newest_checkpoints
from continuar.tokenizers import CodebookConfig, LatentConfig, PixelConfig, Tokenizer, VAEConfig, VQConfig
from continuar.training.config import BaseRun, DataConfig
from continuar.training.latents import LatentStream
from continuar.training.stream import ImageStream, measure_std

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
        tokenizer = read_tokenizer(kept[0], read_model_file(kept[0]).tokenizer)
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
