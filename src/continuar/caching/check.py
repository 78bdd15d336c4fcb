"""Checks a cache of latents against its source and its tokenizer.

1. Every shard has its bytes and its checksum.
2. The tokenizer is the one that made it; the source has as many images and classes as then.
3. Labels of all rows are those of the source.
4. Some images, encoded anew, give the latents that are kept, for every view; decoded, they look like the source (PSNR).
5. Tokens of the cache have a standard deviation of about 1.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from continuar.caching.build import encode_view
from continuar.caching.statistics import LatentStatistics, LatentSums
from continuar.checkpoints.store import checksum
from continuar.checkpoints.tokenizers import fingerprint
from continuar.data.blocks import decode_block
from continuar.data.latents import CacheInfo, LatentCache, read_shard, shard_path
from continuar.data.sources import Source
from continuar.errors import require
from continuar.pipeline import to_uint8
from continuar.tokenizers import Tokenizer, VAETokenizer

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
