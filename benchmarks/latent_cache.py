"""How fast a cache of latents is read in shuffled order, from a warm page cache.

    python benchmarks/latent_cache.py [--images 8192] [--batch 256] [--seconds 5]

Makes a cache of random bfloat16 KL-16 moments ([32, 16, 16], image and mirror image, 32 KiB per image) in a temporary directory,
reads it once, then times `LatentStream.read` (what the reading thread of training does), and `LatentStream.batch` with posterior
draws on the CPU, which training makes on its own device.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from continuar.data.latent_cache import INDEX, CacheInfo, LatentCache, ShardInfo, shard_path
from continuar.io import write_json
from continuar.tokenizers import LatentConfig, Tokenizer
from continuar.tokenizers.pixel import patchify
from continuar.tokenizers.vae import posterior
from continuar.training.data import LatentStream

SHAPE = (32, 16, 16)


class Drawing(Tokenizer):
    """KL-16's tokens without its network."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        raise NotImplementedError

    def tokenize(self, latents: Tensor) -> Tensor:
        mean, std = posterior(latents)
        return patchify(mean + std * torch.randn_like(mean), 1)

    def decode(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


def make(directory: Path, images: int, shard_images: int) -> LatentCache:
    """A cache of random numbers."""
    info = CacheInfo("0" * 32, "none", "none", "train", 256, images, shard_images, 2, SHAPE, "bfloat16", "float32", ("a", "b"))
    write_json(directory / INDEX, info)
    rng = np.random.default_rng(0)
    for shard in range(info.shards):
        rows = len(info.chosen(shard))
        values = torch.from_numpy(rng.standard_normal((rows, 2, *SHAPE), np.float32)).bfloat16()
        shard_path(directory, shard, "bin").write_bytes(values.view(torch.uint8).numpy().tobytes())
        write_json(shard_path(directory, shard, "json"), ShardInfo((0,) * rows, (), (), "00000000"))
    return LatentCache(directory)


def rate(work: Callable[[int], object], batch: int, seconds: float, threads: int = 1) -> float:
    """Images per second."""
    began = time.perf_counter()
    steps = 0
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - began < seconds:
            list(pool.map(work, range(steps, steps + 4 * threads)))
            steps += 4 * threads
    return steps * batch / (time.perf_counter() - began)


def main() -> None:
    """Prints one line per way of reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--shard-images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        cache = make(Path(temporary), options.images, options.shard_images)
        print(f"{len(cache)} images in {cache.info.shards} shards, {len(cache) * cache.info.row_bytes / 2**20:.0f} MiB")
        for _ in cache.blocks():
            pass
        stream = LatentStream(
            cache, Drawing(LatentConfig()), flip=True, batch_size=options.batch, seed=0, device=torch.device("cpu")
        )
        for threads in (1, 2):
            streams = [
                LatentStream(
                    cache, Drawing(LatentConfig()), flip=True, batch_size=options.batch, seed=i, device=torch.device("cpu")
                )
                for i in range(threads)
            ]
            found = rate(lambda step, s=streams: s[step % len(s)].read(step // len(s)), options.batch, options.seconds, threads)
            print(f"read, {threads} thread{'s' if threads > 1 else ''}: {found:,.0f} images/s")
        found = rate(stream.batch, options.batch, options.seconds)
        print(f"read and draw on the CPU: {found:,.0f} images/s")


if __name__ == "__main__":
    main()
