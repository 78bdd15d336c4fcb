"""Building and checking caches of latents, and measuring the scale of latents. `continuar.data.latent_cache` reads caches.

`measure` gives mean and standard deviation of latents:

1. Training sees draws from the posterior. Their moments are known without drawing: E[x] = E[mean], Var[x] = Var[mean] + E[var].
2. Moments are streamed in float64, per channel.
3. scale = 1 / std of all values together (paper, Section 4: 0.2325 for KL-16 on ImageNet), with or without a shift by the mean.

`build_cache` encodes images:

1. ``cache.json`` holds what all shards have in common. If there is one already, everything in it must agree: a cache made by
   another tokenizer is refused.
2. Process r of R makes shards r, r + R, ...; the processes do not communicate.
3. A shard's numbers are written to a temporary file, flushed to the disk and renamed; then its JSON is written. A process killed at
   any moment leaves complete shards and at most one temporary file, and the same command continues from there.

`check_cache` compares a cache with its source and its tokenizer:

1. Every shard has its bytes and its checksum.
2. The tokenizer is the one that made it; the source has as many images and the same classes as then.
3. The labels of all rows are those of the source.
4. Some images, encoded anew, give the latents in the cache, for every view; decoded, they look like the source (PSNR).
5. The tokens of the cache have a standard deviation of about 1.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from continuar.config import differences, to_json
from continuar.data.latent_cache import (
    INDEX,
    CacheInfo,
    DType,
    LatentCache,
    Precision,
    ShardInfo,
    is_cache,
    read_info,
    read_shard,
    shard_path,
)
from continuar.data.loader import check_skipped, decode_block, image_blocks
from continuar.data.sources import Source
from continuar.errors import UserError, require
from continuar.io import atomic_file, checksum, write_json
from continuar.statistics import MomentAccumulator, psnr
from continuar.tensors import exact_float32
from continuar.tokenizers import Tokenizer, VAETokenizer, fingerprint
from continuar.tokenizers.pixel import to_signed, to_uint8
from continuar.tokenizers.vae import posterior

_LOG = logging.getLogger("continuar")


# Encoding


def _device(tokenizer: Tokenizer) -> torch.device:
    return next((p.device for p in tokenizer.parameters()), torch.device("cpu"))


@torch.no_grad()
def encode_pixels(tokenizer: Tokenizer, pixels_BHW3: np.ndarray, view: int = 0, precision: Precision = "float32") -> Tensor:
    """Latents of uint8 images (view 0) or of their mirror images (view 1), on the tokenizer's device."""
    device = _device(tokenizer)
    images = to_signed(torch.from_numpy(pixels_BHW3).to(device))
    # Exact, because convolutions in TF32 give other latents for other batch sizes.
    with torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else exact_float32():
        latents = tokenizer.encode(images.flip(-1) if view else images)
    return latents.float() if latents.is_floating_point() else latents


# Measuring


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of latents before any scale or shift."""

    images: int
    """How many were measured, mirror images counted."""
    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]

    @property
    def scale(self) -> float:
        """Multiplies latents to unit standard deviation."""
        return 1 / self.std


def add_latents(moments: MomentAccumulator, latents: Tensor, has_variance: bool) -> None:
    """Adds latents [B, C, h, w], or draws from posterior moments [B, 2C, h, w], to moments per channel (without covariance)."""
    mean, std = posterior(latents) if has_variance else (latents, None)
    moments.add(_rows_by_channel(mean), None if std is None else _rows_by_channel(std) ** 2)


def _rows_by_channel(x_BChw: Tensor) -> np.ndarray:
    """[B, C, h, w] -> float64 [B h w, C] on the host."""
    return x_BChw.double().permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy()


def latent_statistics(moments: MomentAccumulator, images: int) -> LatentStatistics:
    """The statistics of latents that `add_latents` added.

    Raises:
        UserError: nothing was added, or the values do not vary, or are not finite.
    """
    require(images > 0, "there are no images to measure")
    mean, std = moments.overall()
    require(0 < std < np.inf, f"the latents' standard deviation is {std}; is this the right tokenizer?")
    return LatentStatistics(images, mean, std, tuple(map(float, moments.mean)), tuple(map(float, moments.std())))


def measure(latents: Iterable[Tensor], has_variance: bool) -> LatentStatistics:
    """The statistics of a stream of latents; see `add_latents` and `latent_statistics`."""
    moments, images = MomentAccumulator(covariance=False), 0
    for block in latents:
        add_latents(moments, block, has_variance)
        images += len(block)
    return latent_statistics(moments, images)


def encoded(
    source: Source,
    tokenizer: Tokenizer,
    *,
    images: int | None = None,
    batch_size: int = 64,
    max_skipped_share: float = 0.01,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Latents of images of a source, a batch at a time, encoded in float32.

    Args:
        tokenizer: on the device to compute on.
        images: how many, spread evenly over the source; None is all.
        on_progress: called with (images done, images to do).

    Raises:
        UserError: too many images that cannot be used.
    """
    number = len(source) if images is None else min(images, len(source))
    chosen = [i * len(source) // number for i in range(number)]
    skipped: list[str] = []
    done = 0
    for block in image_blocks(source, chosen, tokenizer.config.image_size, batch_size):
        skipped += block.skipped
        if len(block.images):
            yield encode_pixels(tokenizer, block.images)
        done += len(block.chosen)
        if on_progress is not None:
            on_progress(done, number)
    check_skipped(skipped, number, max_skipped_share)


# Building


@dataclass(frozen=True)
class CacheOptions:
    """Options of building a cache."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the numbers in the cache; ids are whole numbers either way."""
    precision: Precision = "float32"
    """Precision of the encoder's arithmetic."""
    mirror: bool = True
    """Keep the mirror image of every image, too."""
    shard_images: int = 16384
    """Images per shard (KL-16 at 256 pixels: 512 MiB)."""
    batch_size: int = 64
    """Images encoded at once."""
    max_skipped_share: float = 0.01
    """The share of unusable images above which caching stops; 0..1."""

    def __post_init__(self) -> None:
        for name in ("shard_images", "batch_size"):
            require(getattr(self, name) >= 1, f"{name.replace('_', '-')} is {getattr(self, name)}; allowed: 1 or more")
        require(0 <= self.max_skipped_share <= 1, f"max-skipped-share is {self.max_skipped_share}; allowed: 0 to 1")


@dataclass(frozen=True)
class CacheReport:
    """Summary of one call of `build_cache`."""

    info: CacheInfo
    made: int
    """Shards made now."""
    complete: int
    """Shards that are complete, those of other processes included."""
    skipped: tuple[str, ...]
    """Images that could not be used, in the shards made now."""


def _cache_info(source: Source, tokenizer: Tokenizer, options: CacheOptions, where: tuple[str, str, str]) -> CacheInfo:
    size = tokenizer.config.image_size
    example = encode_pixels(tokenizer, np.zeros((1, size, size, 3), np.uint8))
    dtype: DType = options.dtype if example.is_floating_point() else "int32"
    return CacheInfo(
        fingerprint(tokenizer),
        *where,
        image_size=size,
        count=len(source),
        shard_images=options.shard_images,
        views=2 if options.mirror else 1,
        shape=tuple(example.shape[1:]),
        dtype=dtype,
        precision=options.precision,
        classes=source.classes,
    )


def build_cache(
    source: Source,
    tokenizer: Tokenizer,
    directory: Path,
    options: CacheOptions,
    *,
    where: tuple[str, str, str],
    rebuild: bool = False,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> CacheReport:
    """Makes the shards of this process that are not there yet.

    Args:
        tokenizer: on the device to compute on.
        where: (tokenizer, source, split), by which `check_cache` and training find them again.
        rebuild: also make shards anew whose checksum is wrong.
        rank, world_size: this process, and how many there are.
        on_progress: called with (images done, images to do) of this process.

    Raises:
        UserError: another cache is there, the disk is full, or too many images cannot be used. Complete shards stay.
    """
    info = _cache_info(source, tokenizer, options, where)
    _prepare(directory, info)
    todo = [s for s in range(rank, info.shards, world_size) if not _is_complete(directory, info, s, verify=rebuild)]
    total, done = sum(len(info.chosen(s)) for s in todo), 0
    needed, free = total * info.row_bytes, shutil.disk_usage(directory).free
    if needed > free:
        # Not an error: other files may be deleted, and the shards that fit are kept.
        _LOG.warning("%s has %.1f GiB free; up to %.1f GiB are to be written", directory, free / 2**30, needed / 2**30)
    skipped: list[str] = []

    def progress(images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(done, total)

    def complete() -> int:
        return sum(_is_complete(directory, info, s) for s in range(info.shards))

    for shard in todo:
        try:
            skipped += _write_shard(source, tokenizer, info, directory, shard, options.batch_size, progress)
        except OSError as problem:
            raise UserError(
                f"{shard_path(directory, shard, 'bin')} cannot be written: {problem.strerror or problem}; "
                f"{complete()} of {info.shards} shards are complete, and the same command makes the others"
            ) from problem
        check_skipped(skipped, total, options.max_skipped_share)
    return CacheReport(info, len(todo), complete(), tuple(skipped))


def _prepare(directory: Path, info: CacheInfo) -> None:
    """Writes ``cache.json``, or refuses to continue another cache."""
    require(not directory.exists() or directory.is_dir(), f"{directory} is a file; allowed: a directory for the cache")
    if is_cache(directory):
        old = read_info(directory)
        require(
            old.fingerprint == info.fingerprint,
            f"{directory} was made by another tokenizer (fingerprint {old.fingerprint[:12]}, not {info.fingerprint[:12]}), "
            f"which was at {old.tokenizer}; choose another directory",
        )
        # Tokenizer and source may have been moved, but must not have changed.
        moved = {"tokenizer": old.tokenizer, "source": old.source}
        changed = differences(to_json(old), to_json(info) | moved)
        require(not changed, f"{directory} is another cache ({'; '.join(changed)}); choose another directory")
        return
    # Hidden files belong to a process that was killed here, or to another rank that is writing cache.json now.
    taken = directory.exists() and any(not p.name.startswith(".") for p in directory.iterdir())
    require(not taken, f"{directory} exists and is not a cache of latents; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / INDEX, info)


def _is_complete(directory: Path, info: CacheInfo, shard: int, verify: bool = False) -> bool:
    try:
        found = read_shard(directory, info, shard)
    except UserError:
        return False
    if verify and checksum(shard_path(directory, shard, "bin")) != found.checksum:
        _LOG.warning("%s has a wrong checksum and is made anew", shard_path(directory, shard, "bin"))
        return False
    return True


def _write_shard(
    source: Source,
    tokenizer: Tokenizer,
    info: CacheInfo,
    directory: Path,
    shard: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> tuple[str, ...]:
    """Writes a complete shard or nothing; returns why images were skipped."""
    numbers, index = shard_path(directory, shard, "bin"), shard_path(directory, shard, "json")
    # The JSON says that the numbers are complete, so it goes first and comes last.
    index.unlink(missing_ok=True)
    for stale in directory.glob(f".{numbers.stem}.*.tmp"):
        stale.unlink(missing_ok=True)
    labels: list[int] = []
    missing: list[int] = []
    skipped: list[str] = []
    crc = 0
    with atomic_file(numbers) as file:
        for block in image_blocks(source, info.chosen(shard), info.image_size, batch_size):
            if len(block.images):
                data = _rows(tokenizer, block.images, info)
                file.write(data)
                crc = zlib.crc32(data, crc)
            labels += source.labels[block.index].tolist()
            missing += sorted(set(block.chosen) - set(block.index.tolist()))
            skipped += block.skipped
            progress(len(block.chosen))
    write_json(index, ShardInfo(tuple(labels), tuple(missing), tuple(skipped), f"{crc:08x}"))
    return tuple(skipped)


def _rows(tokenizer: Tokenizer, pixels_BHW3: np.ndarray, info: CacheInfo) -> bytes:
    """The bytes of a batch's rows [B, views, *shape]."""
    latents = torch.stack([encode_pixels(tokenizer, pixels_BHW3, view, info.precision) for view in range(info.views)], 1)
    require(
        not latents.is_floating_point() or bool(torch.isfinite(latents).all()),
        "the encoder gave latents that are not finite; try --precision float32, and look at the tokenizer's weights",
    )
    return latents.to("cpu", info.torch_dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()


# Checking

# The largest relative error of latents encoded anew, by (dtype, precision). bfloat16 has 8 bits of precision; float32 encoders
# differ by their kernels between batch sizes and devices, bfloat16 encoders by more.
_TOLERANCE = {("float32", "float32"): 1e-3, ("bfloat16", "float32"): 8e-3}
# For ids, the share that may differ: a vector between two codes goes either way.
_TOLERANCE |= {("int32", "float32"): 1e-2, ("int32", "bfloat16"): 1e-2}
_BFLOAT16_ENCODER_TOLERANCE = 5e-2


@dataclass(frozen=True)
class CacheCheck:
    """Findings of `check_cache`, which raises if the cache is not good."""

    info: CacheInfo
    rows: int
    sampled: int
    """Images encoded anew."""
    largest_error: float
    """Largest difference of their latents, relative to the largest latent; for ids the share that differs."""
    psnr: float
    """Images decoded from the cache against the source, in dB."""
    statistics: LatentStatistics | None
    """Statistics of all latents in the cache; None for ids."""
    token_std: float | None
    """Standard deviation of tokens; None for ids and for a tokenizer without a scale."""
    pictures: np.ndarray
    """uint8 [2 sampled, H, W, 3]: source and decoded, in turn."""


def check_cache(cache: LatentCache, source: Source, tokenizer: Tokenizer, *, samples: int = 16, seed: int = 0) -> CacheCheck:
    """Compares a cache with its source and its tokenizer.

    Args:
        tokenizer: on the device to compute on.
        samples: how many images are encoded anew.

    Raises:
        UserError: names the first fault.
    """
    info = cache.info
    _verify_checksums(cache)
    cache.check_fingerprint(fingerprint(tokenizer))
    require(len(source) == info.count, f"{info.source} has {len(source)} images; the cache was made of {info.count}")
    require(source.classes == info.classes, f"{info.source} has other classes than when the cache was made")
    different = np.flatnonzero(source.labels[cache.index] != cache.labels)
    if len(different):
        row = int(different[0])
        place = int(cache.index[row])
        raise UserError(
            f"{len(different)} labels differ from the source: row {row} has the label {cache.labels[row]}, "
            f"{source.name(place)} has {source.labels[place]}"
        )
    rows = np.sort(np.random.default_rng(seed).choice(len(cache), min(samples, len(cache)), replace=False))
    with ThreadPoolExecutor() as pool:
        block = decode_block(source, cache.index[rows].tolist(), info.image_size, pool)
    require(not block.skipped, f"an image of the source can no longer be used: {'; '.join(block.skipped[:1])}")
    error = _largest_error(cache, rows, block.images, tokenizer)
    with torch.no_grad():
        decoded = to_uint8(tokenizer.reconstruct(cache.read(rows).to(_device(tokenizer)))).cpu().numpy()
    squared_error = ((block.images.astype(np.float64) - decoded) ** 2).mean()
    statistics, token_std = None, None
    if isinstance(tokenizer, VAETokenizer):
        statistics = measure(cache.blocks(), tokenizer.config.network.has_variance)
        token_std = statistics.std * tokenizer.config.scale or None
    pictures = np.stack((block.images, decoded), 1).reshape(-1, *block.images.shape[1:])
    return CacheCheck(info, len(cache), len(rows), error, float(psnr(squared_error)), statistics, token_std, pictures)


def _verify_checksums(cache: LatentCache) -> None:
    bad = []
    for shard in range(cache.info.shards):
        path = shard_path(cache.directory, shard, "bin")
        if checksum(path) != read_shard(cache.directory, cache.info, shard).checksum:
            bad.append(path.name)
    require(not bad, f"{cache.directory}: wrong checksum of {', '.join(bad)}; `continuar cache ... --rebuild` makes them anew")


def _largest_error(cache: LatentCache, rows: np.ndarray, images_BHW3: np.ndarray, tokenizer: Tokenizer) -> float:
    """The largest error of latents encoded anew, over all views; see `CacheCheck.largest_error`."""
    info, worst = cache.info, 0.0
    for view in range(info.views):
        kept, anew = cache.read(rows, view), encode_pixels(tokenizer, images_BHW3, view, info.precision).cpu()
        different, largest = (kept != anew).float().mean(), (kept.float() - anew).abs().max() / anew.abs().max()
        worst = max(worst, (different if info.dtype == "int32" else largest).item())
    allowed = _TOLERANCE.get((info.dtype, info.precision), _BFLOAT16_ENCODER_TOLERANCE)
    require(
        worst <= allowed,
        f"{cache.directory}: latents of the source, encoded anew, differ by {worst:.2g} (allowed: {allowed:.2g}); "
        "were the images changed or put in another order?",
    )
    return worst
