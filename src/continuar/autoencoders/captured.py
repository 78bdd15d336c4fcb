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
    """A function of (images, kind) on a CUDA device. Draws are functions of the default generator's seed, replayed or not.

    Args:
        function: without host synchronisation. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Tensor, bool], Result]) -> None:
        self._function = function
        self._kind: bool | None = None
        self._begin()

    def _begin(self) -> None:
        """Gives a graph's memory back: kinds of steps do not come again."""
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images: Tensor | None = None
        self._result: Result | None = None

    def __call__(self, images: Tensor, kind: bool) -> Result:
        """The function's result for images of the same shape at every call."""
        if kind != self._kind:
            self._kind = kind
            self._begin()
        if self._runs < WARMUP_STEPS:
            self._runs += 1
            return self._on_side_stream(images, kind)
        if self._images is None:
            self._images = torch.empty_like(images)
        self._images.copy_(images)
        if self._graph is None:
            self._graph = self._capture(self._images, kind)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _on_side_stream(self, images: Tensor, kind: bool) -> Result:
        """As captures want what runs before them."""
        side, current = torch.cuda.Stream(images.device), torch.cuda.current_stream(images.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self._function(images, kind)
        current.wait_stream(side)
        return result

    def _capture(self, images: Tensor, kind: bool) -> torch.cuda.CUDAGraph:
        state = torch.cuda.get_rng_state(images.device)  # a capture computes nothing, but moves the generator on
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._function(images, kind)
        torch.cuda.set_rng_state(state, images.device)
        return graph
