"""CUDA graphs of functions that read and write tensors which keep their addresses.

1. A function first runs on a side stream. The runs give the first results, and libraries choose algorithms and allocate memory.
2. It is then captured on the same stream, and from then on replayed as one launch.
3. Graphs of one pool share the memory of their intermediate results, because they are replayed one after another.

Without a GPU functions are simply called. If a capture fails, the process stays usable: one line is logged, and functions are
called from then on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

Key = tuple[object, ...]
T = TypeVar("T")


class GraphPool:
    """The memory and the stream that some graphs share.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = torch.cuda.Stream(self.device)
        self.handle = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], T]) -> T:
        """Runs a function on the side stream, after what was launched before and before what is launched next."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of the function and the tensors it returned, which every replay overwrites. Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        with kept_generator(self.device):
            try:
                # torch.cuda.graph captures on the current device, and does not go back to the stream before if a capture fails:
                # the two outer contexts see to both.
                recording = torch.cuda.graph(graph, pool=self.handle, stream=self.stream)
                with torch.cuda.device(self.device), torch.cuda.stream(self.stream), recording:
                    result = function()
            except BaseException:
                self._recover()
                raise
        return graph, result

    def _recover(self) -> None:
        """Ends what a failed capture leaves open: allocation from its pool, and the capturing mode of the default generator."""
        with suppress(RuntimeError):  # the capture has ended both by itself if it failed late
            torch._C._cuda_endAllocateToPool(self.device.index, self.handle)
            torch._C._cuda_releasePool(self.device.index, self.handle)
        self.handle = torch.cuda.graph_pool_handle()
        # Only the end of a complete capture takes the generator out of this mode, so make one of a single fill.
        value = torch.zeros((), device=self.device)
        with torch.cuda.device(self.device), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(self.device)):
            value.zero_()


@contextmanager
def kept_generator(device: torch.device) -> Iterator[None]:
    """Gives the device's default generator the state back that it had before the block, whatever happens inside."""
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)


def renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Makes the next forward create the parameters' AccumulateGrad nodes anew, on the stream it runs on.

    A node belongs to the stream it was created on, and lives while any autograd graph holds it, for instance that of somebody's
    copy of a parameter. Backward would then wait for that stream, and no capture may do that.
    """
    for parameter in parameters:
        data = parameter.data
        # Torch forgets the node of a tensor whose data changes its type.
        parameter.data = torch.empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32, device=data.device)
        parameter.data = data


class Graphs:
    """Runs functions by key, and replays those it has captured.

    Args:
        pool: of these graphs; None: functions are only called.
        strict: raise an error of a capture instead of falling back.
        warm_up: runs of a function before it is captured. They count: a function may update weights.
        parameters: what the functions differentiate by.

    Attributes:
        clock: measures what runs while it is set.
    """

    def __init__(
        self, pool: GraphPool | None, strict: bool = False, *, warm_up: int = 1, parameters: Iterable[Tensor] = ()
    ) -> None:
        self._pool, self._strict, self._warm_up, self._parameters = pool, strict, warm_up, list(parameters)
        self._runs: Counter[Key] = Counter()
        self._captured: dict[Key, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self.clock: Clock | None = None

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Key, function: Callable[[], T]) -> T:
        """Calls the function, or replays what was captured under its key; a replay overwrites the result of the one before.

        A clock calls what it measures by the key's first part.
        """
        if self.clock is None:
            return self._run(key, function)
        with self.clock.measure(str(key[0])):
            return self._run(key, function)

    def _run(self, key: Key, function: Callable[[], T]) -> T:
        if self._pool is None:
            return function()
        if key in self._captured:
            graph, result = self._captured[key]
            graph.replay()
            return result
        if self._runs[key] == 0:
            renew_accumulators(self._parameters)
        result = self._pool.run(function)
        self._runs[key] += 1
        if self._runs[key] >= self._warm_up:
            self.capture(key, function)
        return result

    def capture(self, key: Key, function: Callable[[], object]) -> None:
        """Captures a function that has been warmed up, for `run` to replay."""
        if self._pool is None:
            return
        renew_accumulators(self._parameters)
        try:
            self._captured[key] = self._pool.capture(function)
        except Exception as problem:
            # Ending a capture that has failed raises a second, less clear error.
            first = problem.__context__ or problem
            if self._strict or isinstance(first, torch.OutOfMemoryError) or not isinstance(first, Exception):
                raise first from None
            _LOG.warning("no CUDA graph (%s): kernels are launched one by one", str(first).split("\n", maxsplit=1)[0])
            self._captured.clear()
            self._pool = None

    def clear(self) -> None:
        """Forgets all graphs, so that their memory can be used for others."""
        self._captured.clear()
        self._runs.clear()
        if self._pool is not None:
            self._pool.handle = torch.cuda.graph_pool_handle()  # a pool ends with its last graph


class Clock:
    """Seconds by part. On a GPU they are measured between events, and reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Counts the time of the block as ``part``."""
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
