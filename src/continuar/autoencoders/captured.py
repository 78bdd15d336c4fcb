"""A whole training step as one CUDA graph: networks this small leave a GPU waiting for the thousands of launches of a step.

Everything of a step is on the device (`TokenizerStep`), so all of it can be captured, optimizers included. Of each kind of step
(before and after the discriminator joins) the first few run as they are: libraries choose their algorithms, optimizers make their
moments. They are steps of the run like any other. The next one is captured, and from then on replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP_STEPS = 3


class Captured(Generic[Result]):
    """Calls a function of (images, kind) whose draws come from the default generator of a CUDA device, replayed or not.

    What the function reads and writes must keep its place from a kind's first capture on; a checkpoint is loaded before it.

    Args:
        device: where everything happens.
    """

    def __init__(self, device: torch.device) -> None:
        # One stream for all: what its allocations leave is used again, by the next step that warms up.
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._kind: bool | None = None
        self._begin()

    def _begin(self) -> None:
        """Forgets the graph: kinds of steps do not come again."""
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images: Tensor | None = None
        self._result: Result | None = None

    def __call__(self, function: Callable[[Tensor, bool], Result], images: Tensor, kind: bool) -> Result:
        """The function's result, which the next call overwrites.

        Args:
            function: the same at every call, without host synchronisation.
            images: of the same shape at every call.
        """
        if kind != self._kind:
            self._kind = kind
            self._begin()
        if self._runs < WARMUP_STEPS:
            self._runs += 1
            return self._on_stream(function, images, kind)
        if self._images is None:
            self._images = torch.empty_like(images)
        self._images.copy_(images)
        if self._graph is None:
            self._graph = self._capture(function, self._images, kind)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _on_stream(self, function: Callable[[Tensor, bool], Result], images: Tensor, kind: bool) -> Result:
        """As captures want what runs before them."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function(images, kind)
        current.wait_stream(self._stream)
        return result

    def _capture(self, function: Callable[[Tensor, bool], Result], images: Tensor, kind: bool) -> torch.cuda.CUDAGraph:
        state = torch.cuda.get_rng_state(self._device)  # a capture computes nothing, but moves the generator on
        graph = torch.cuda.CUDAGraph()
        # Left to itself torch captures on a stream of the current device, which need not be this one.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=self._stream):
            self._result = function(images, kind)
        torch.cuda.set_rng_state(state, self._device)
        return graph
