"""Training batches from a cache of latents, as a pure function of (seed, step); the posterior is drawn on the training device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from continuar.data.latents import LatentCache
from continuar.tokenizers import Tokenizer
from continuar.training.stream import IndexStream

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
