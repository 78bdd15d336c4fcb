"""Engines that execute forward and backward of one micro-batch.

Each engine leaves gradients in ``parameter.grad``: the first micro-batch of a step replaces what was there, the others add to it.
All engines return the micro-batch's mean loss.

* `EagerEngine`: as written.
* `CompiledEngine`: torch.compile of the parts that repeat, transformer blocks and head, per number of masked tokens. Blocks of
  equal shape share one compilation; compiling the whole model would compile each of them again.
* `GraphEngine`: forward and backward captured as a CUDA graph per number of masked tokens, without compilation. It pays where a
  step is many small kernels. A replay draws from the generator's state at that moment, so random numbers stay functions of the
  seed.
* `CompiledGraphEngine`: the compiled step, captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continuar.cuda_graphs import GraphPool, Graphs, kept_generator
from continuar.distributed import SingleProcess
from continuar.errors import require
from continuar.models.base import TokenModel
from continuar.models.transformer import Block
from continuar.orders import View

MAX_COMPILED = 7
"""Masked counts that can be compiled. torch.compile keeps 8 shapes of one function; the decoder's blocks use one of them."""
WARMUP_STEPS = 3
"""Eager steps before a capture, in which libraries allocate what they will reuse."""


class MeanLoss(nn.Module):
    """A model's mean loss as a module's forward, which parallel wrappers need."""

    def __init__(self, model: TokenModel, label_dropout: float) -> None:
        super().__init__()
        self.model, self.label_dropout = model, label_dropout

    def forward(self, tokens: Tensor, labels_B: Tensor, view: View) -> Tensor:
        return self.model.loss(tokens, labels_B, view, self.label_dropout).mean()


class EagerEngine:
    """Runs forward and backward as they are written.

    Args:
        model: trains; its weights are sharded from here on where ``parallel`` shards.
        label_dropout: see `TokenModel.loss`.
        bf16: run under bfloat16 autocast.
        parallel: the processes that train together.
        micro_batches: how many of them this process has in a step; their gradients are averaged.

    Raises:
        UserError: more numbers of masked tokens than torch.compile keeps graphs for.
    """

    compiled: ClassVar[bool] = False

    def __init__(
        self, model: TokenModel, label_dropout: float, bf16: bool, parallel: SingleProcess | None = None, micro_batches: int = 1
    ) -> None:
        self._parallel = parallel or SingleProcess()
        self._model, self._bf16, self._last = model, bf16, micro_batches - 1
        self._device = next(model.parameters()).device
        self._objective = self._parallel.wrap(MeanLoss(model, label_dropout), bf16)
        self._compute: Callable[..., Tensor] = self._objective
        self._share = torch.full((), 1 / micro_batches, device=self._device)
        if self.compiled:
            _compile(model)

    def __call__(self, tokens: Tensor, labels_B: Tensor, view: View, number: int = 0) -> Tensor:
        """The mean loss of micro-batch ``number`` of a step, detached."""
        if number == 0:
            self._model.zero_grad(set_to_none=True)
        with self._parallel.syncing(self._objective, number == self._last):
            loss = self._forward(tokens, labels_B, view)
            loss.backward(self._share)
        return loss.detach()

    def _forward(self, tokens: Tensor, labels_B: Tensor, view: View) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self._compute(tokens, labels_B, view)


class CompiledEngine(EagerEngine):
    """Compiles the model's parts in place."""

    compiled = True


class GraphEngine(EagerEngine):
    """Replays CUDA graphs. All graphs share one memory pool, and all gradients one buffer. Where gradients are accumulated, a
    masked count has two graphs: one that replaces gradients and one that adds to them.

    Several processes average the buffer after the replay of the last micro-batch, in one piece. So sending does not overlap with
    backward; that costs little while a step is long beside sending 4 bytes per parameter.

    Raises:
        UserError: the device is not a CUDA device, or the weights are sharded.
    """

    def __init__(
        self, model: TokenModel, label_dropout: float, bf16: bool, parallel: SingleProcess | None = None, micro_batches: int = 1
    ) -> None:
        device, parallel = next(model.parameters()).device, parallel or SingleProcess()
        captures = "train.engine captures CUDA graphs, which"
        require(device.type == "cuda", f"{captures} a {device.type} device does not have; allowed: eager, compile")
        require(not parallel.sharded, f"{captures} have no sharded weights; allowed: --parallel ddp")
        super().__init__(model, label_dropout, bf16, None, micro_batches)  # a graph holds no communication
        self._processes = parallel
        parallel.share([*(p.detach() for p in model.parameters()), *model.buffers()])
        self._flat, self._gradients = flat_gradients(model)
        self._compute = self._copies = Bf16WeightCopies(self._objective, bf16)
        self._pool = GraphPool(device)
        self._graphs = Graphs(self._pool, parameters=model.parameters())
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, tokens: Tensor, labels_B: Tensor, view: View, number: int = 0) -> Tensor:
        if number == 0:
            self._copies.round()
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        given, first = (tokens, labels_B, view.order_BN), self._inputs is None
        if self._inputs is None:
            self._inputs = tokens.clone(), labels_B.clone(), view.order_BN.clone()
        for static, new in zip(self._inputs, given, strict=True):
            static.copy_(new)
        if first:
            self._capture_all()
        # A count that the model did not announce is captured when it comes.
        replace = number == 0
        loss = self._graphs.run((view.known, replace), partial(self._forward_backward, view.known, replace))
        if number == self._last:
            self._processes.average(self._flat)
        return loss

    def _capture_all(self) -> None:
        """Warms up all masked counts and then captures them all. So there is one set of activations at any time: that of the step
        that warms up, whose memory is given back, and then the pool's."""
        counts = [self._model.order.seq_len - masked for masked in self._model.num_masked_distribution()]
        # Warming up draws numbers and adds to gradients and metrics, which the step must find as they were.
        added_to = [x for x in (self._flat, self._model.loss_by_timestep.time_losses) if x is not None]
        before = [x.clone() for x in added_to]
        with kept_generator(self._device):
            memory = {known: self._pool.run(partial(self._warm_up, known)) for known in counts}
        for x, value in zip(added_to, before, strict=True):
            x.copy_(value)
        # The memory that the largest graph leaves in the pool suffices for the others.
        for known in sorted(counts, key=memory.__getitem__, reverse=True):
            for replace in (True, False) if self._last else (True,):
                self._graphs.capture((known, replace), partial(self._forward_backward, known, replace))

    def _warm_up(self, known: int) -> int:
        """Runs some steps with ``known`` known tokens and gives their memory back; bytes that forward keeps for backward."""
        held = 0
        for _ in range(WARMUP_STEPS):
            before = torch.cuda.memory_allocated(self._device)
            loss = self._forward(*self._static(known))
            held = torch.cuda.memory_allocated(self._device) - before
            self._backward(loss, replace=False)
        torch.cuda.empty_cache()
        return held

    def _forward_backward(self, known: int, replace: bool) -> Tensor:
        loss = self._forward(*self._static(known))
        self._backward(loss, replace)
        return loss.detach()

    def _backward(self, loss: Tensor, replace: bool) -> None:
        found = torch.autograd.grad(loss, self._copies.leaves, self._share, allow_unused=True)
        collect_gradients(self._gradients, found, replace)

    def _static(self, known: int) -> tuple[Tensor, Tensor, View]:
        assert self._inputs is not None
        tokens, labels_B, order_BN = self._inputs
        return tokens, labels_B, View(order_BN, known)


class CompiledGraphEngine(GraphEngine):
    """Captures the compiled step. Compilation happens while the masked counts warm up."""

    compiled = True


class Bf16WeightCopies:
    """A module that computes with bfloat16 copies of the blocks' matrices, made once per step.

    Autocast would round a weight at every use, and compiled parts by kernels of their own that also turn its gradient back into
    float32. With copies one launch rounds all matrices, and gradients are widened where they are collected anyway. The numbers are
    the same.

    Args:
        module: contains the blocks.
        bf16: whether autocast is on; without it there are no copies.

    Attributes:
        leaves: tensors to differentiate by, in the order of the module's parameters: a copy where there is one. A copy's gradient,
        in
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
        """Copies the present weights."""
        if self._copies:
            torch._foreach_copy_([*self._copies.values()], [*self._sources.values()])  # pyright: ignore[reportPrivateImportUsage]

    def __call__(self, *given: object) -> Tensor:
        """The module's forward."""
        return functional_call(self._module, self._copies, given)


def flat_gradients(model: TokenModel) -> tuple[Tensor, list[Tensor]]:
    """One buffer of zeros for all gradients, and each parameter's part of it, which begins at a multiple of 64 bytes."""
    parameters = list(model.parameters())
    sizes = [-(-p.numel() // 16) * 16 for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    return flat, [part[: p.numel()].view_as(p) for p, part in zip(parameters, flat.split(sizes), strict=True)]


def collect_gradients(places: Sequence[Tensor], found: Sequence[Tensor | None], replace: bool) -> None:
    """Writes gradients to their places, or adds them to what is there; a missing gradient is zero.

    Takes a few launches for all. Autograd would add each gradient by a launch of its own.
    """
    pairs = list(zip(places, found, strict=True))
    if replace:
        for place in (place for place, gradient in pairs if gradient is None):
            place.zero_()
    put = torch._foreach_copy_ if replace else torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
    for dtype in {gradient.dtype for gradient in found if gradient is not None}:  # one type per launch
        to, gradients = zip(*((place, g) for place, g in pairs if g is not None and g.dtype == dtype), strict=True)
        put(to, gradients)


def _compile(model: TokenModel) -> None:
    """Compiles the model's parts in place; parameters, state dict and results stay the same."""
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
