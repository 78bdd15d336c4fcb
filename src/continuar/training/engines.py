"""bfloat16 copies of the blocks' matrices, made once per step.

Autocast rounds a weight where it is used: compiled parts do so in kernels of their own, and turn its gradient back into float32 in
others before anything reads it. With copies, one launch rounds all matrices, and gradients are widened where they are collected
anyway. The numbers are the same.

How forward and backward of one micro-batch are executed. Each engine leaves gradients in ``parameter.grad``, each micro-batch's
share added to those of the step before it, and returns the micro-batch's mean loss.

* `EagerEngine`: as written.
* `CompiledEngine`: torch.compile of the parts that repeat, transformer block and head, per number of masked tokens: blocks
  of equal shape share one compilation, where compiling the whole model would compile each of them again.
* `GraphEngine`: forward and backward captured once per number of masked tokens and replayed as one launch; no compilation. It pays
  where a step is many small kernels. Random numbers stay functions of the generator's seed: a replay reads the state it finds.
  Matrices are rounded to bfloat16 once per step (`Bf16WeightCopies`).
* `CompiledGraphEngine`: both, the compiled step captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continuar.distributed import SingleProcess
from continuar.errors import UserError, require
from continuar.models.base import TokenModel
from continuar.models.transformer import Block
from continuar.orders import View


class Bf16WeightCopies:
    """A module that computes with such copies where bfloat16 autocast would make them.

    Args:
        module: whatever contains the blocks.
        bf16: whether autocast is on; without it there are no copies.

    Attributes:
        leaves: what to differentiate by, in the order of the module's parameters: a copy where there is one. A copy's gradient, in
            bfloat16, is the parameter's.
    """

    def __init__(self, module: nn.Module, bf16: bool) -> None:
        self._module = module
        linears = (
            f"{name}.{inner}.weight"
            for name, block in module.named_modules()
            if bf16 and isinstance(block, Block)
            for inner, part in block.named_modules()
            if isinstance(part, nn.Linear)
        )
        parameters = dict(module.named_parameters())
        self._sources = {name: parameters[name].detach() for name in linears}
        self._copies = {name: torch.empty_like(p, dtype=torch.bfloat16).requires_grad_() for name, p in self._sources.items()}
        self.leaves = [self._copies.get(name, p) for name, p in parameters.items()]

    @torch.no_grad()
    def round(self) -> None:
        """Makes the copies those of the present weights."""
        if self._copies:
            torch._foreach_copy_([*self._copies.values()], [*self._sources.values()])  # pyright: ignore[reportPrivateImportUsage]

    def __call__(self, *given: object) -> Tensor:
        """The module's forward."""
        return functional_call(self._module, self._copies, given)


MAX_COMPILED = 7
"""Masked counts that can be compiled. torch.compile keeps 8 shapes of one function; the decoder's blocks use one of them."""
WARMUP_STEPS = 3
"""Eager steps before a capture, in which libraries allocate what they will reuse."""


class Objective(nn.Module):
    """A model's mean loss as a module's forward, which is what parallel wrappers take hold of."""

    def __init__(self, model: TokenModel, label_dropout: float) -> None:
        super().__init__()
        self.model, self.label_dropout = model, label_dropout

    def forward(self, tokens: Tensor, labels_B: Tensor, view: View) -> Tensor:
        return self.model.loss(tokens, labels_B, view, self.label_dropout).mean()


class Engine(Protocol):
    """Forward and backward of one micro-batch."""

    def __call__(self, tokens: Tensor, labels_B: Tensor, view: View, number: int = 0) -> Tensor:
        """The mean loss, detached. Micro-batch ``number`` 0 of a step replaces what was in ``parameter.grad``, others add to it."""
        ...


class EagerEngine:
    """See the module's docstring.

    Args:
        model: what trains; its weights are sharded from here on where ``parallel`` shards.
        label_dropout: see `TokenModel.loss`.
        bf16: run under bfloat16 autocast.
        parallel: the processes that train together.
        micro_batches: how many of them this process has in a step; their gradients are averaged.
    """

    def __init__(
        self, model: TokenModel, label_dropout: float, bf16: bool, parallel: SingleProcess | None = None, micro_batches: int = 1
    ) -> None:
        self._parallel = parallel or SingleProcess()
        self._model, self._bf16, self._last = model, bf16, micro_batches - 1
        device = next(model.parameters()).device
        self._device_type = device.type
        self._objective = self._parallel.wrap(Objective(model, label_dropout), bf16)
        self._compute: Callable[..., Tensor] = self._objective
        self._share = torch.full((), 1 / micro_batches, device=device)

    def __call__(self, tokens: Tensor, labels_B: Tensor, view: View, number: int = 0) -> Tensor:
        if number == 0:
            self._model.zero_grad(set_to_none=True)
        with self._parallel.syncing(self._objective, number == self._last):
            loss = self._forward(tokens, labels_B, view)
            loss.backward(self._share)
        return loss.detach()

    def _forward(self, tokens: Tensor, labels_B: Tensor, view: View) -> Tensor:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return self._compute(tokens, labels_B, view)


class CompiledEngine(EagerEngine):
    """See the module's docstring.

    Raises:
        UserError: more numbers of masked tokens than torch.compile keeps graphs for.
    """

    def __init__(
        self, model: TokenModel, label_dropout: float, bf16: bool, parallel: SingleProcess | None = None, micro_batches: int = 1
    ) -> None:
        super().__init__(model, label_dropout, bf16, parallel, micro_batches)
        _compile(model)


class GraphEngine(EagerEngine):
    """See the module's docstring. All graphs share one memory pool, and all gradients one buffer. Where gradients are accumulated,
    a masked count has two graphs: one that begins with zeros and one that adds.

    The first call warms up all of the model's masked counts and then captures them all, so that there is one set of activations at
    any time: that of the step that warms up, whose memory is given back, and then the pool's.

    Several processes average that buffer after the replay of the last micro-batch, in one piece: nothing of it overlaps with
    backward, which costs little while a step is long beside sending 4 bytes per parameter.

    Raises:
        UserError: the device is not a CUDA device, or the weights are sharded.
    """

    def __init__(
        self, model: TokenModel, label_dropout: float, bf16: bool, parallel: SingleProcess | None = None, micro_batches: int = 1
    ) -> None:
        super().__init__(model, label_dropout, bf16, None, micro_batches)  # what is captured talks to no other process
        if self._device_type != "cuda":
            raise UserError(
                f"train.engine captures CUDA graphs, which a {self._device_type} device does not have; allowed: eager, compile"
            )
        self._together = parallel or SingleProcess()
        require(
            not self._together.sharded, "train.engine captures CUDA graphs, which have no sharded weights; allowed: --parallel ddp"
        )
        self._together.share([*(p.detach() for p in model.parameters()), *model.buffers()])
        self._flat, self._gradients = flat_gradients(model)
        self._compute = self._rounded = Bf16WeightCopies(self._objective, bf16)
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._captured: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._flat.device)

    def __call__(self, tokens: Tensor, labels_B: Tensor, view: View, number: int = 0) -> Tensor:
        if number == 0:
            self._rounded.round()
        if self._inputs is None:
            self._inputs = tokens.clone(), labels_B.clone(), view.order_BN.clone()
        for static, given in zip(self._inputs, (tokens, labels_B, view.order_BN), strict=True):
            static.copy_(given)
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        if not self._captured:
            self._capture_all()
        graph, loss = self._captured[view.known, number == 0]
        graph.replay()
        if number == self._last:
            self._together.average(self._flat)
        return loss

    def _capture_all(self) -> None:
        device = self._flat.device
        state = torch.cuda.get_rng_state(device)  # capturing draws nothing, but warming up does: leave it as this step found it
        needs = self._warm_up()
        # What the largest leaves in the pool has room for the others.
        for known in sorted(needs, key=lambda known: needs[known], reverse=True):
            for fresh in (True, False) if self._last else (True,):
                self._captured[known, fresh] = self._capture(known, fresh)
        torch.cuda.set_rng_state(state, device)

    def _warm_up(self) -> dict[int, int]:
        """Runs some steps of every number of known tokens and gives their memory back; bytes that each leaves for backward."""
        counts = [self._model.order.seq_len - queried for queried in self._model.num_masked_distribution()]
        added_to = [x for x in (self._flat, self._model.loss_by_timestep.time_losses) if x is not None]
        kept = [x.clone() for x in added_to]
        needs: dict[int, int] = {}
        self._stream.wait_stream(torch.cuda.current_stream(self._flat.device))
        with torch.cuda.stream(self._stream):
            for known in counts:
                for _ in range(WARMUP_STEPS):
                    needs[known] = self._warm_up_once(known)
                torch.cuda.empty_cache()
        torch.cuda.current_stream(self._flat.device).wait_stream(self._stream)
        for x, found in zip(added_to, kept, strict=True):
            x.copy_(found)
        return needs

    def _warm_up_once(self, known: int) -> int:
        before = torch.cuda.memory_allocated(self._flat.device)
        loss = self._forward(*self._given(known))
        held = torch.cuda.memory_allocated(self._flat.device) - before
        self._backward(loss, fresh=False)
        return held

    def _capture(self, known: int, fresh: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Left to itself torch captures on a stream of the current device, which need not be this one.
        with torch.cuda.device(self._flat.device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = self._forward(*self._given(known))
            self._backward(loss, fresh)
        return graph, loss.detach()

    def _backward(self, loss: Tensor, fresh: bool) -> None:
        collect(self._gradients, torch.autograd.grad(loss, self._rounded.leaves, self._share, allow_unused=True), fresh)

    def _given(self, known: int) -> tuple[Tensor, Tensor, View]:
        assert self._inputs is not None
        tokens, labels_B, order_BN = self._inputs
        return tokens, labels_B, View(order_BN, known)


class CompiledGraphEngine(GraphEngine):
    """See the module's docstring. Compilation happens while the masked counts warm up."""

    def __init__(
        self, model: TokenModel, label_dropout: float, bf16: bool, parallel: SingleProcess | None = None, micro_batches: int = 1
    ) -> None:
        super().__init__(model, label_dropout, bf16, parallel, micro_batches)
        _compile(model)


def flat_gradients(model: TokenModel) -> tuple[Tensor, list[Tensor]]:
    """One buffer of zeros for all gradients, and each parameter's part of it, which begins at a multiple of 64 bytes."""
    parameters = list(model.parameters())
    sizes = [-(-p.numel() // 16) * 16 for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    return flat, [part[: p.numel()].view_as(p) for p, part in zip(parameters, flat.split(sizes), strict=True)]


def collect(places: Sequence[Tensor], found: Sequence[Tensor | None], fresh: bool) -> None:
    """Gradients into their places by a few launches for all, or onto what is there (one launch per matrix whose gradient is of
    another type). Autograd would add each to zeros by a launch of its own."""
    pairs = list(zip(places, found, strict=True))
    if fresh:
        for place in (place for place, gradient in pairs if gradient is None):
            place.zero_()
    put = torch._foreach_copy_ if fresh else torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
    for dtype in {gradient.dtype for gradient in found if gradient is not None}:  # one type per launch
        to, gradients = zip(*((place, g) for place, g in pairs if g is not None and g.dtype == dtype), strict=True)
        put(to, gradients)


def _compile(model: TokenModel) -> None:
    """Compiles the model's parts in place; parameters, state dict and results stay what they were."""
    counts = len(model.num_masked_distribution())
    require(
        counts <= MAX_COMPILED,
        f"train.engine compiles {counts} masked counts; allowed: {MAX_COMPILED}, see backbone.mask_granularity",
    )
    # Symbolic shapes would serve all counts at once, but Inductor of torch 2.11 fails on them on CUDA.
    for part in model.compiled_parts():
        part.compile(dynamic=False)


ENGINES: dict[str, type[EagerEngine]] = {
    "eager": EagerEngine,
    "compile": CompiledEngine,
    "graphs": GraphEngine,
    "compile-graphs": CompiledGraphEngine,
}
