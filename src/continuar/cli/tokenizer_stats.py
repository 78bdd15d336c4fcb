"""``continuar tokenizer stats TOKENIZER DATA``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from continuar.caching import LatentStatistics, encoded, measure
from continuar.checkpoints.tokenizers import (
    TOKENIZER_CONFIG,
    Changes,
    find_saved,
    load_tokenizer,
    save_tokenizer,
    set_scale,
)
from continuar.cli.common import Device, ImageSize, Split, at_least, progress_bars
from continuar.data.latent_cache import LatentCache, is_cache
from continuar.data.sources import find_source
from continuar.distributed import pick_device
from continuar.errors import UserError, require
from continuar.tokenizers import VAETokenizer, fingerprint


@dataclass(frozen=True)
class Options:
    """Options of `continuar tokenizer stats`."""

    tokenizer: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TOKENIZER")]
    """A saved tokenizer or a training run of one; or a diffusers directory or hub id, or an LDM-layout file, with --out."""
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """Training images (folders, Parquet, tars), or a cache of this tokenizer's latents."""
    split: Split = "train"
    images: int | None = None
    """Measure this many images, evenly spread; all if not given."""
    image_size: ImageSize = None
    shift: bool = False
    """Also subtract the mean, as some autoencoders with 16 channels do; the paper does not."""
    dry_run: bool = False
    """Measure and print only."""
    out: Path | None = None
    """Keep the tokenizer with its scale here, instead of changing it where it is."""
    batch_size: int = 64
    """Images encoded together."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Measure mean and standard deviation of a tokenizer's latents, and keep scale = 1/std with the tokenizer."""
    at_least(1, images=options.images, batch_size=options.batch_size)
    home = find_saved(Path(options.tokenizer))
    kept = options.dry_run or options.out is not None or home is not None
    require(kept, f"{options.tokenizer} is not a saved tokenizer, which could keep its scale; give --out DIR")
    tokenizer = load_tokenizer(options.tokenizer, Changes(options.image_size))
    if not isinstance(tokenizer, VAETokenizer):
        raise UserError(f"{options.tokenizer} is a tokenizer of kind '{tokenizer.config.kind}', which needs no scale; allowed: vae")
    tokenizer.to(pick_device(options.device))
    with progress_bars() as bar:
        found = measure(_latents(options, tokenizer, bar("measuring")), tokenizer.config.network.has_variance)
    scale, shift = found.scale, found.mean if options.shift else 0.0
    print(summary(found, tokenizer.config.scale, shift), end="")
    if options.dry_run:
        return
    if options.out is not None:
        save_tokenizer(replace(tokenizer.config, scale=scale, shift=shift), tokenizer.state_dict(), options.out)
    else:
        assert home is not None
        set_scale(home, scale, shift)
    print(f"written   {(options.out or home or Path()) / TOKENIZER_CONFIG}")


def _latents(options: Options, tokenizer: VAETokenizer, progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """Latents of images, or of a cache made by this tokenizer."""
    if is_cache(options.data):
        require(options.images is None, f"--images is {options.images}; a cache is measured whole")
        cache = LatentCache(options.data)
        cache.check_fingerprint(fingerprint(tokenizer))
        total = len(cache) * cache.info.views
        done = 0
        for block in cache.blocks():
            yield block
            done += len(block)
            progress(done, total)
        return
    source = find_source(options.data, options.split)
    device = next(tokenizer.parameters()).device
    yield from encoded(source, tokenizer, device=device, images=options.images, batch_size=options.batch_size, on_progress=progress)


def summary(found: LatentStatistics, before: float, shift: float) -> str:
    """What was measured, one line each."""
    lines = [
        f"images    {found.images}",
        f"mean      {found.mean:.6g}",
        f"std       {found.std:.6g}",
        *(
            f"channel {c:<2} mean {mean:.6g}, std {std:.6g}"
            for c, (mean, std) in enumerate(zip(found.channel_mean, found.channel_std, strict=True))
        ),
        f"scale     {found.scale:.6g}" + (f" (was {before:.6g})" if before else ""),
        f"shift     {shift:.6g}",
    ]
    return "\n".join(lines) + "\n"
