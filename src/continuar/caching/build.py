"""Makes a cache of latents; see `continuar.data.latents` for its layout.

1. ``cache.json`` says what the cache is of. Where there is one already, everything in it must agree: a cache made by another
   tokenizer is refused.
2. Process r of R makes shards r, r + R, ...; they need not speak with each other.
3. A shard's numbers go to a temporary file, are flushed to the disk, and get their name; then its JSON is written. A process killed
   at any moment leaves complete shards and at most one temporary file, and the same command goes on from there.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from continuar.caching.statistics import to_signed
from continuar.checkpoints.store import checksum, write_json
from continuar.checkpoints.tokenizers import fingerprint
from continuar.configs import differences, to_json
from continuar.data.blocks import image_blocks
from continuar.data.images import check_skipped
from continuar.data.latents import INDEX, CacheInfo, DType, ShardInfo, is_cache, read_info, read_shard, shard_path
from continuar.data.sources import Source
from continuar.errors import UserError, require
from continuar.tokenizers import Tokenizer

_LOG = logging.getLogger("continuar")


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is made."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """How numbers are kept; ids are whole numbers either way."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the encoder computes in."""
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
    temporary = numbers.with_name(f".{numbers.name}.tmp")
    index.unlink(missing_ok=True)
    for stale in directory.glob(f".{numbers.stem}.*.tmp"):
        stale.unlink(missing_ok=True)
    labels: list[int] = []
    missing: list[int] = []
    skipped: list[str] = []
    crc = 0
    try:
        with temporary.open("wb") as file:
            for block in image_blocks(source, info.chosen(shard), info.image_size, options.batch_size):
                if len(block.images):
                    data = _rows(tokenizer, torch.from_numpy(block.images), info)
                    file.write(data)
                    crc = zlib.crc32(data, crc)
                labels += source.labels[block.index].tolist()
                missing += sorted(set(block.chosen) - set(block.index.tolist()))
                skipped += block.skipped
                progress(block.asked)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(numbers)
    finally:
        temporary.unlink(missing_ok=True)
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
