"""CUDA graphs of functions that read and write tensors which stay where they are.

A function is run once, on a side stream, which is its first result and the warm-up of libraries; then it is captured, and from then on
replayed as one launch. All graphs share one pool of memory: they are replayed one after another, and nothing lives there in between.
Elsewhere than on CUDA the function is just called. A capture that fails is said once, and the function is called from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

_LOG = logging.getLogger(__name__)


class Graphs:
    """See the module's docstring.

    Args:
        device: where the functions run.
        strict: raise what a capture raises, instead of falling back.
        pool: memory shared with others, of `torch.cuda.graph_pool_handle`.
    """

    def __init__(self, device: torch.device, strict: bool = False, pool: Any = None) -> None:
        self._device, self._strict, self._pool = device, strict, pool
        self._enabled = device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Runs ``function``, which must give the same result when run again, or what was captured under its key."""
        if not self._enabled:
            function()
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            self._first(key, function)

    def _first(self, key: Hashable, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function()
        current.wait_stream(side)
        # Unfinished work may still use memory that was freed meanwhile; a capture must not reuse it.
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                function()
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            if self._strict:
                raise
            _LOG.warning("no CUDA graph (%s): steps are launched one by one", str(problem).split("\n", maxsplit=1)[0])
            self._enabled = False
            # The capture may have left its results half written.
            function()
            return
        self._graphs[key] = graph
