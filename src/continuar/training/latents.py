"""Training batches from a cache of latents, as a pure function of (seed, step); the posterior is drawn on the training device."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from continuar.data.latents import LatentCache
from continuar.tokenizers import Tokenizer
from continuar.training.stream import IndexStream

_LOG = logging.getLogger("continuar")


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
        self._reader = ThreadPoolExecutor(1, "latents")
        self._looked = False
        self._ahead: tuple[tuple[int, int], Future[tuple[Tensor, Tensor]]] | None = None

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
        """Micro-batch ``slot`` of batch ``step``; the posterior draws from torch's default generator of the device."""
        expected, future = self._ahead or (None, None)
        found = future.result() if future is not None else None  # also waits for a batch that nobody wants: one reader at a time
        latents, labels = found if found is not None and expected == (step, slot) else self.read(step, slot)
        following = (step, slot + 1) if slot + 1 in self._slots else (step + 1, self._slots.start)
        self._ahead = following, self._reader.submit(self.read, *following)
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
