"""CUDA graphs of functions that read and write tensors which stay where they are.

A function is run once, on a side stream, which is its first result and the warm-up of libraries; then it is captured, and from then
on replayed as one launch. Graphs share a pool of memory: they are replayed one after another, and nothing lives there in between.
Elsewhere than on CUDA the function is just called. A capture that fails is said once, and functions are called from then on.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_LOG = logging.getLogger(__name__)

Key = tuple[object, ...]


class GraphPool:
    """What some graphs share: the memory of their intermediate results, and the stream they are captured on. It ends with them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.handle, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


class Graphs:
    """See the module's docstring.

    Args:
        pool: of these graphs; None: there are none here.
        strict: raise what a capture raises, instead of falling back.

    Attributes:
        clock: measures what runs while it is set.
    """

    def __init__(self, pool: GraphPool | None, strict: bool = False) -> None:
        self._pool, self._strict = pool, strict
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.clock: Clock | None = None

    def run(self, key: Key, function: Callable[[], None]) -> None:
        """Runs ``function``, which must give the same result when run again, or what was captured under its key.

        A clock calls what it measures by the key's first part.
        """
        if self.clock is None:
            self._run(key, function)
        else:
            with self.clock.measure(str(key[0])):
                self._run(key, function)

    def _run(self, key: Key, function: Callable[[], None]) -> None:
        if self._pool is None:
            function()
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            self._first(self._pool, key, function)

    def _first(self, pool: GraphPool, key: Key, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(current)
        with torch.cuda.stream(pool.stream):
            function()
        current.wait_stream(pool.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream):
                function()
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            if self._strict:
                raise
            _LOG.warning("no CUDA graph (%s): steps are launched one by one", str(problem).split("\n", maxsplit=1)[0])
            self._pool = None
            return
        self._graphs[key] = graph


class Clock:
    """Seconds by part. On a GPU these are between events of its own, and reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """What is done within the block belongs to ``part``."""
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((part, first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds of each part so far."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for part, first, last in self._events:
            self._seconds[part] += first.elapsed_time(last) / 1e3
        self._events.clear()
        return dict(self._seconds)
