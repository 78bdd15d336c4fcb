"""Mean and standard deviation of a tokenizer's latents, which is where its scale comes from.

1. Latents of every image are those that training will see: draws from the posterior. Their moments are known without drawing:
   E[x] = E[mean], E[x^2] = E[mean^2 + variance].
2. Sums are streamed in float64, per channel.
3. scale = 1 / std of all values together (paper, Section 4: 0.2325 for KL-16 on ImageNet), with or without a shift by the mean.

Makes a cache of latents; see `continuar.data.latent_cache` for its layout.

1. ``cache.json`` says what the cache is of. Where there is one already, everything in it must agree: a cache made by another
   tokenizer is refused.
2. Process r of R makes shards r, r + R, ...; they need not speak with each other.
3. A shard's numbers go to a temporary file, are flushed to the disk, and get their name; then its JSON is written. A process killed
   at any moment leaves complete shards and at most one temporary file, and the same command goes on from there.

Checks a cache of latents against its source and its tokenizer.

1. Every shard has its bytes and its checksum.
2. The tokenizer is the one that made it; the source has as many images and classes as then.
3. Labels of all rows are those of the source.
4. Some images, encoded anew, give the latents that are kept, for every view; decoded, they look like the source (PSNR).
5. Tokens of the cache have a standard deviation of about 1.
"""

from __future__ import annotations

import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from continuar.config import differences, to_json
from continuar.data.latent_cache import INDEX, CacheInfo, DType, LatentCache, ShardInfo, is_cache, read_info, read_shard, shard_path
from continuar.data.loader import check_skipped, decode_block, image_blocks
from continuar.data.sources import Source
from continuar.distributed import SingleProcess
from continuar.errors import UserError, require
from continuar.io import atomic_file, checksum, write_json
from continuar.tokenizers import Tokenizer, VAETokenizer, fingerprint
from continuar.tokenizers.pixel import to_signed, to_uint8
from continuar.tokenizers.vae import posterior


@dataclass(frozen=True)
class LatentStatistics:
    """Of latents before any scale or shift."""

    images: int
    """How many were measured, mirror images counted."""
    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]

    @property
    def scale(self) -> float:
        """What multiplies latents to unit standard deviation."""
        return 1 / self.std


class LatentSums:
    """Sums of latents per channel, in float64 on the host."""

    def __init__(self, has_variance: bool) -> None:
        self._has_variance = has_variance
        self._images, self._values = 0, 0
        self._sum, self._squares = np.zeros(0), np.zeros(0)

    def add(self, latents: Tensor) -> None:
        """Counts latents [B, C, h, w], or moments [B, 2C, h, w]."""
        if self._has_variance:
            mean, std = posterior(latents)
            first, second = mean.double(), mean.double().square() + std.double().square()
        else:
            first = latents.double()
            second = first.square()
        total, squares = first.sum((0, 2, 3)).cpu().numpy(), second.sum((0, 2, 3)).cpu().numpy()
        self._sum = total if self._values == 0 else self._sum + total
        self._squares = squares if self._values == 0 else self._squares + squares
        self._images += len(latents)
        self._values += first.numel() // first.shape[1]

    def join(self, parallel: SingleProcess) -> None:
        """Counts what every process has added; all of them together, each having added something."""
        counts = parallel.total(torch.tensor([self._images, self._values])).tolist()
        self._images, self._values = counts
        sums = np.stack((self._sum, self._squares))
        self._sum, self._squares = parallel.total(torch.from_numpy(sums)).numpy()

    def statistics(self) -> LatentStatistics:
        """Of what was added.

        Raises:
            UserError: nothing was added, or the values do not vary, or are not finite.
        """
        require(self._images > 0, "there are no images to measure")
        mean, square = self._sum / self._values, self._squares / self._values
        std = np.sqrt(np.maximum(square - mean**2, 0))
        whole = float(mean.mean())
        whole_std = float(np.sqrt(max(float(square.mean()) - whole**2, 0.0)))
        require(0 < whole_std < np.inf, f"the latents' standard deviation is {whole_std}; is this the right tokenizer?")
        return LatentStatistics(self._images, whole, whole_std, tuple(map(float, mean)), tuple(map(float, std)))


def measure(latents: Iterable[Tensor], has_variance: bool) -> LatentStatistics:
    """The statistics of a stream of latents."""
    sums = LatentSums(has_variance)
    for block in latents:
        sums.add(block)
    return sums.statistics()


def encoded(
    source: Source,
    tokenizer: VAETokenizer,
    *,
    device: torch.device,
    images: int | None = None,
    batch_size: int = 64,
    max_skipped_share: float = 0.01,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Latents of a source's images, batch by batch.

    Args:
        images: measure this many, evenly spread over the source; None: all.
        max_skipped_share: of images that cannot be used, 0..1.

    Raises:
        UserError: too many images cannot be used.
    """
    count = len(source)
    number = count if images is None else min(images, count)
    chosen = [i * count // number for i in range(number)]
    skipped: list[str] = []
    done = 0
    with torch.no_grad():
        for block in image_blocks(source, chosen, tokenizer.config.image_size, batch_size):
            skipped += block.skipped
            if len(block.images):
                yield tokenizer.encode(to_signed(torch.from_numpy(block.images).to(device)))
            done += len(block.chosen)
            if on_progress is not None:
                on_progress(done, number)
    if skipped:
        check_skipped(skipped, number, max_skipped_share)


_LOG = logging.getLogger("continuar")


@dataclass(frozen=True)
class CacheOptions:
    """Content and making of a cache."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the stored latents; ids are int32."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the encoder."""
    mirror: bool = True
    """Also keep the mirror image of every image."""
    shard_images: int = 16384
    """Images per shard (KL-16 at 256 pixels: 512 MiB)."""
    batch_size: int = 64
    """Images encoded together."""
    max_skipped_share: float = 0.01
    """Largest share of unusable images with which caching goes on; 0..1."""

    def __post_init__(self) -> None:
        for name in ("shard_images", "batch_size"):
            require(getattr(self, name) >= 1, f"{name.replace('_', '-')} is {getattr(self, name)}; allowed: 1 or more")
        require(0 <= self.max_skipped_share <= 1, f"max-skipped-share is {self.max_skipped_share}; allowed: 0 to 1")


@dataclass(frozen=True)
class CacheReport:
    """What was done."""

    info: CacheInfo
    made: int
    """Shards made now."""
    complete: int
    """Shards that are complete, others' included."""
    skipped: tuple[str, ...]
    """Images that could not be used, in the shards made now."""


def cache_info(source: Source, tokenizer: Tokenizer, options: CacheOptions, *, where: tuple[str, str, str]) -> CacheInfo:
    """What ``cache.json`` will say.

    Args:
        where: (tokenizer, source, split), for people and for the check.
    """
    size = tokenizer.config.image_size
    device = next((p.device for p in tokenizer.parameters()), torch.device("cpu"))
    with torch.no_grad():
        example = tokenizer.encode(torch.zeros(1, 3, size, size, device=device))
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
    info: CacheInfo,
    directory: Path,
    options: CacheOptions,
    *,
    rebuild: bool = False,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> CacheReport:
    """Makes the shards of this process that are not there yet.

    Args:
        tokenizer: on its device.
        info: of `cache_info`.
        rebuild: also make shards anew whose checksum is wrong.
        rank, world_size: which process this is, of how many.
        on_progress: called with (images done, images to do) of this process.

    Raises:
        UserError: another cache is there, the disk is full, or too many images cannot be used. Complete shards stay.
    """
    _prepare(directory, info)
    mine = range(rank, info.shards, world_size)
    todo = [s for s in mine if not _is_complete(directory, info, s, rebuild)]
    total, done = sum(len(info.chosen(s)) for s in todo), 0
    _warn_of_space(directory, total * info.row_bytes)
    skipped: list[str] = []

    def progress(images: int) -> None:
        nonlocal done
        done += images
        if on_progress is not None:
            on_progress(done, total)

    for shard in todo:
        try:
            skipped += _write_shard(source, tokenizer, info, directory, shard, options, progress)
        except OSError as problem:
            left = sum(_is_complete(directory, info, s, False) for s in range(info.shards))
            raise UserError(
                f"{shard_path(directory, shard, 'bin')} cannot be written: {problem.strerror or problem}; "
                f"{left} of {info.shards} shards are complete, and the same command makes the others"
            ) from problem
        if skipped:
            check_skipped(skipped, total, options.max_skipped_share)
    complete = sum(_is_complete(directory, info, s, False) for s in range(info.shards))
    return CacheReport(info, len(todo), complete, tuple(skipped))


def _prepare(directory: Path, info: CacheInfo) -> None:
    """Writes ``cache.json``, or refuses to go on with another cache."""
    require(not directory.exists() or directory.is_dir(), f"{directory} is a file; allowed: a directory for the cache")
    if is_cache(directory):
        old = read_info(directory)
        require(
            old.fingerprint == info.fingerprint,
            f"{directory} was made by another tokenizer (fingerprint {old.fingerprint[:12]}, not {info.fingerprint[:12]}), "
            f"which was at {old.tokenizer}; choose another directory",
        )
        # Where things lie may change, what they are may not.
        moved = {"tokenizer": old.tokenizer, "source": old.source}
        changed = differences(to_json(old), to_json(info) | moved)
        require(not changed, f"{directory} is another cache ({'; '.join(changed)}); choose another directory")
        return
    # Hidden files are those of a process that was killed here, or of another rank that is writing the same now.
    taken = directory.exists() and any(not p.name.startswith(".") for p in directory.iterdir())
    require(not taken, f"{directory} exists and is not a cache of latents; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / INDEX, info)


def _is_complete(directory: Path, info: CacheInfo, shard: int, verify: bool) -> bool:
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
    options: CacheOptions,
    progress: Callable[[int], None],
) -> tuple[str, ...]:
    """One shard, all of it or nothing; returns what was skipped."""
    numbers, index = shard_path(directory, shard, "bin"), shard_path(directory, shard, "json")
    index.unlink(missing_ok=True)
    for stale in directory.glob(f".{numbers.stem}.*.tmp"):
        stale.unlink(missing_ok=True)
    labels: list[int] = []
    missing: list[int] = []
    skipped: list[str] = []
    crc = 0
    with atomic_file(numbers) as file:
        for block in image_blocks(source, info.chosen(shard), info.image_size, options.batch_size):
            if len(block.images):
                data = _rows(tokenizer, torch.from_numpy(block.images), info)
                file.write(data)
                crc = zlib.crc32(data, crc)
            labels += source.labels[block.index].tolist()
            missing += sorted(set(block.chosen) - set(block.index.tolist()))
            skipped += block.skipped
            progress(len(block.chosen))
    write_json(index, ShardInfo(tuple(labels), tuple(missing), tuple(skipped), f"{crc:08x}"))
    return tuple(skipped)


@torch.no_grad()
def _rows(tokenizer: Tokenizer, pixels_BHW3: Tensor, info: CacheInfo) -> bytes:
    """The bytes of a batch's rows [B, views, *shape]."""
    latents = torch.stack([encode_view(tokenizer, pixels_BHW3, view, info.precision) for view in range(info.views)], 1)
    require(
        not latents.is_floating_point() or bool(torch.isfinite(latents).all()),
        "the encoder gave latents that are not finite; try --precision float32, and look at the tokenizer's weights",
    )
    return latents.to("cpu", info.torch_dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def encode_view(tokenizer: Tokenizer, pixels_BHW3: Tensor, view: int, precision: str) -> Tensor:
    """Latents of uint8 images (view 0) or their mirror images (view 1), on the tokenizer's device."""
    device = next((p.device for p in tokenizer.parameters()), torch.device("cpu"))
    images = to_signed(pixels_BHW3.to(device))
    with torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else _no_tf32():
        latents = tokenizer.encode(images.flip(-1) if view else images)
    return latents.float() if latents.is_floating_point() else latents


@contextmanager
def _no_tf32() -> Iterator[None]:
    """float32 is float32: convolutions on a GPU would take TF32, which differs from batch size to batch size."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _warn_of_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        _LOG.warning("%s has %.1f GiB free; up to %.1f GiB are to be written", directory, free / 2**30, needed / 2**30)


# bfloat16 keeps 8 bits; encoders differ by their kernels between batch sizes and devices, bfloat16 ones by more.
_TOLERANCE = {("float32", "float32"): 1e-3, ("bfloat16", "float32"): 8e-3}
_LOOSE = 5e-2


@dataclass(frozen=True)
class CacheCheck:
    """What was found; the cache is good if the check returns."""

    info: CacheInfo
    rows: int
    sampled: int
    """Images encoded anew."""
    largest_error: float
    """Of their latents, relative to the largest latent; for ids the share that differs."""
    psnr: float
    """Of images decoded from the cache against the source, in dB."""
    statistics: LatentStatistics | None
    """Of the cache's latents; None for ids."""
    token_std: float | None
    """Standard deviation of tokens; None for ids and for a tokenizer without a scale."""
    pictures: np.ndarray
    """uint8 [2 sampled, H, W, 3]: source and decoded, in turn."""


def verify_checksums(directory: Path, info: CacheInfo) -> None:
    """Reads every shard once.

    Raises:
        UserError: names the shards that are damaged.
    """
    bad = []
    for shard in range(info.shards):
        if checksum(shard_path(directory, shard, "bin")) != read_shard(directory, info, shard).checksum:
            bad.append(shard_path(directory, shard, "bin").name)
    require(not bad, f"{directory}: wrong checksum of {', '.join(bad)}; `continuar cache ... --rebuild` makes them anew")


def check_cache(cache: LatentCache, source: Source, tokenizer: Tokenizer, *, samples: int = 16, seed: int = 0) -> CacheCheck:
    """See the module's docstring.

    Args:
        tokenizer: on the device to compute on.
        samples: how many images are encoded anew.

    Raises:
        UserError: names the first thing that is wrong.
    """
    info = cache.info
    verify_checksums(cache.directory, info)
    cache.check_fingerprint(fingerprint(tokenizer))
    require(len(source) == info.count, f"{info.source} has {len(source)} images; the cache was made of {info.count}")
    require(source.classes == info.classes, f"{info.source} has other classes than when the cache was made")
    different = np.flatnonzero(source.labels[cache.index] != cache.labels)
    if len(different):
        row = int(different[0])
        raise_label = f"row {row} has the label {cache.labels[row]}, {source.name(int(cache.index[row]))} has "
        require(False, f"{len(different)} labels differ from the source: {raise_label}{source.labels[cache.index[row]]}")
    rows = np.sort(np.random.default_rng(seed).choice(len(cache), min(samples, len(cache)), replace=False))
    with ThreadPoolExecutor() as pool:
        block = decode_block(source, cache.index[rows].tolist(), info.image_size, pool)
    require(not block.skipped, f"an image of the source can no longer be used: {'; '.join(block.skipped[:1])}")
    error = _compare(cache, rows, block.images, tokenizer)
    decoded = _decoded(cache.read(rows), tokenizer)
    psnr = _psnr(block.images, decoded)
    statistics = _statistics(cache, tokenizer)
    scale = tokenizer.config.scale if isinstance(tokenizer, VAETokenizer) else 0.0
    pictures = np.stack((block.images, decoded), 1).reshape(-1, *block.images.shape[1:])
    token_std = statistics.std * scale if statistics is not None and scale else None
    return CacheCheck(info, len(cache), len(rows), error, psnr, statistics, token_std, pictures)


@torch.no_grad()
def _compare(cache: LatentCache, rows: np.ndarray, images_BHW3: np.ndarray, tokenizer: Tokenizer) -> float:
    """The largest relative error of latents encoded anew."""
    info, worst = cache.info, 0.0
    for view in range(info.views):
        anew = encode_view(tokenizer, torch.from_numpy(images_BHW3), view, info.precision).cpu()
        kept = cache.read(rows, view)
        worst = max(worst, _error(kept, anew))
    allowed = 0.01 if info.dtype == "int32" else _TOLERANCE.get((info.dtype, info.precision), _LOOSE)
    require(
        worst <= allowed,
        f"{cache.directory}: latents of the source, encoded anew, differ by {worst:.2g} (allowed: {allowed:.2g}); "
        "were the images changed or put in another order?",
    )
    return worst


def _error(kept: Tensor, anew: Tensor) -> float:
    if not kept.is_floating_point():
        return (kept != anew).float().mean().item()
    return ((kept.float() - anew).abs().max() / anew.abs().max()).item()


@torch.no_grad()
def _decoded(latents: Tensor, tokenizer: Tokenizer) -> np.ndarray:
    """uint8 images [B, H, W, 3] of latents, through the decoder alone: no scale is needed."""
    device = next((p.device for p in tokenizer.parameters()), torch.device("cpu"))
    return to_uint8(tokenizer.reconstruct(latents.to(device))).cpu().numpy()


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    mse = float(((a.astype(np.float64) - b) ** 2).mean())
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def _statistics(cache: LatentCache, tokenizer: Tokenizer) -> LatentStatistics | None:
    if not isinstance(tokenizer, VAETokenizer):
        return None
    sums = LatentSums(tokenizer.config.network.has_variance)
    for block in cache.blocks():
        sums.add(block)
    return sums.statistics()
