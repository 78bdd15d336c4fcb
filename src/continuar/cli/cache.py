"""``continuar cache DATA TOKENIZER DST`` and ``continuar cache check DST``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from continuar.checkpoints.tokenizers import Changes, find_saved, load_tokenizer
from continuar.cli.common import Device, Ids, ImageSize, Split, at_least, local_device, progress_bars
from continuar.data.cache_build import CacheCheck, CacheOptions, CacheReport, build_cache, check_cache
from continuar.data.latent_cache import LatentCache
from continuar.data.sources import find_source
from continuar.errors import UserError, require
from continuar.pictures import grid, save_png
from continuar.tokenizers import LatentConfig


@dataclass(frozen=True)
class Options:
    """Options of `continuar cache`."""

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """A folder of class folders, Parquet files, or WebDataset tars."""
    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TOKENIZER")]
    """A saved tokenizer, a training run of one, an LDM-layout file, a diffusers directory or hub id."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The cache's directory."""
    options: Annotated[CacheOptions, tyro.conf.arg(name="")] = field(default_factory=CacheOptions)
    split: Split = "train"
    image_size: ImageSize = None
    ids: Ids = False
    rebuild: bool = False
    """Make shards with a wrong checksum anew, too."""
    device: Device = "auto"


@dataclass(frozen=True)
class CheckOptions:
    """Options of `continuar cache check`."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The cache's directory."""
    tokenizer: str | None = None
    """Path of the tokenizer, if it was moved."""
    data: Path | None = None
    """Path of the images, if they were moved."""
    samples: int = 16
    """Number of images to encode again."""
    out: Path | None = None
    """Write source and decoded images, side by side, to this PNG file."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Encode every image of DATA and its mirror image once, and keep the latents (posterior moments, or ids) in DST.

    The same command continues where a killed one stopped. Under torchrun each process encodes its share.
    """
    rank, world_size = _place()
    source = find_source(options.data, options.split)
    tokenizer = load_tokenizer(options.tokenizer, Changes(options.image_size, ids=options.ids or None))
    if isinstance(tokenizer.config, LatentConfig):
        raise UserError(f"{options.tokenizer} is a tokenizer without an encoder; give the autoencoder itself")
    tokenizer = tokenizer.to(local_device(options.device))
    where = (str(_absolute(options.tokenizer)), str(options.data.absolute()), options.split)
    with progress_bars(shown=rank == 0) as bar:
        report = build_cache(
            source,
            tokenizer,
            options.dst,
            options.options,
            where=where,
            rebuild=options.rebuild,
            rank=rank,
            world_size=world_size,
            on_progress=bar("caching"),
        )
    print(summary(report, options.dst), end="")


def summary(report: CacheReport, directory: Path) -> str:
    """The report of a new cache as text."""
    info = report.info
    shape = " x ".join(map(str, info.shape))
    size = info.count * info.row_bytes / 2**30
    lines = [
        f"latents  {shape} {info.dtype}, {info.views} views of {info.count} images, {size:.3g} GiB",
        f"shards   {report.made} made now, {report.complete} of {info.shards} complete",
        *(f"skipped  {line}" for line in report.skipped[:10]),
        *([f"skipped  ... {len(report.skipped)} in all"] if len(report.skipped) > 10 else []),
        f"written  {directory}  (continuar cache check {directory})",
    ]
    return "\n".join(lines) + "\n"


def check(options: CheckOptions) -> None:
    """Check a cache: checksums, tokenizer, labels, latents and decoded images against the source, standard deviation of tokens."""
    at_least(1, samples=options.samples)
    cache = LatentCache(options.dst)
    info = cache.info
    where = info.tokenizer if options.tokenizer is None else options.tokenizer
    ids = info.dtype == "int32" and len(info.shape) == 1
    tokenizer = load_tokenizer(where, Changes(info.image_size, ids=ids or None)).to(local_device(options.device))
    source = find_source(Path(info.source) if options.data is None else options.data, info.split)
    found = check_cache(cache, source, tokenizer, samples=options.samples)
    print(check_summary(found), end="")
    if options.out is not None:
        save_png(grid(found.pictures, None, columns=8), options.out)
        print(f"pictures   {options.out}")


def check_summary(found: CacheCheck) -> str:
    """The report of a check as text."""
    lines = [
        f"rows       {found.rows} of {found.info.count} images, {found.info.shards} shards, checksums right",
        f"labels     as in the source, {len(found.info.classes)} classes",
        f"latents    {found.sampled} images encoded anew, largest difference {found.largest_error:.2g}",
        f"decoded    PSNR {found.psnr:.2f} dB against the source",
    ]
    if found.statistics is not None:
        s = found.statistics
        lines.append(f"std        latents {s.std:.6g} (mean {s.mean:.6g})")
        if found.token_std is None:
            lines.append("scale      the tokenizer has none: `continuar tokenizer stats TOKENIZER DST` measures it")
        else:
            off = "" if abs(found.token_std - 1) <= 0.1 else ", more than 10% off 1: measure the scale again"
            lines.append(f"tokens     std {found.token_std:.4f}{off}")
    return "\n".join(lines) + "\n"


def _place() -> tuple[int, int]:
    """(rank, world size) from the environment that torchrun sets."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    fits = rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)
    require(fits, f"RANK is '{rank}' and WORLD_SIZE '{world_size}'; allowed: 0 up to below the world size, as torchrun sets them")
    return int(rank), int(world_size)


def _absolute(source: str) -> Path | str:
    """An absolute path; a hub id as it is."""
    path = Path(source)
    return (find_saved(path) or path).absolute() if path.exists() else source
