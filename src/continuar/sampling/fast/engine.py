"""The fast engine: equal to the eager one, with fewer and larger kernel launches.

1. `FastMAE` keeps the backbone's rows in the order of generation; `FastCausal` decodes by one step of fixed shapes.
2. `FastDiffusion` runs the diffusion head's loop; other heads draw as in the eager engine.
3. On CUDA a step is two graphs, captured at first use and replayed later: the backbone per number of known and predicted tokens,
   the head per number of rows. On a CPU the Linear weights are packed (weights.py).

Graphs read and write fixed addresses, the `StaticBuffers` of one batch shape. One generation at a time uses them; afterwards they
are kept for the next generation of that shape.

In bfloat16 the transformer's residual stream is bfloat16 too, which it is not under autocast; the sampler's state stays float32.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from continuar.cuda_graphs import Clock, GraphPool, Graphs
from continuar.errors import UserError, require
from continuar.heads.base import Guidance
from continuar.heads.diffusion import DiffusionHead, DiffusionOptions
from continuar.models.autoregressive import Model
from continuar.models.base import TokenModel
from continuar.models.causal import Causal
from continuar.models.mar import MAE
from continuar.noise import KeyedNoise, RowNoise
from continuar.sampling.fast.causal import FastCausal
from continuar.sampling.fast.head import FastDiffusion
from continuar.sampling.fast.kernels import Kernels, largest_difference
from continuar.sampling.fast.mar import FastMAE
from continuar.sampling.fast.weights import DTYPES, EngineWeights, Precision
from continuar.sampling.generate import NoiseOf, PlanStep, PreparedBatch, Progress, SamplingInput, prepare_batch
from continuar.sampling.memory import bytes_per_image, check_fits, fitting_images, free_bytes
from continuar.sampling.options import SamplingOptions
from continuar.tensors import batched_gather, batched_scatter_, matmul_precision

MAX_IDLE = 4
"""Batch shapes whose buffers and graphs are kept while no generation uses them."""
STEPS_AHEAD = 2
_LOG = logging.getLogger(__name__)


def unsupported_reason(model: TokenModel) -> str | None:
    """Says why the engine cannot run a model; None if it can."""
    if not isinstance(model, Model):
        return f"a {model.config.kind} has no fast form"
    if model.order.chooses:
        return f"the {model.config.order.kind} order decides positions while it generates"
    if not isinstance(model.backbone, MAE | Causal):
        return f"the {model.config.backbone.kind} backbone has no fast form"
    if model.config.backbone.positions != "learned":
        return f"{model.config.backbone.positions} positions have no fast form"
    return None


@cache
def best_kernels(device: torch.device) -> Kernels:
    """The fused kernels on a CUDA device if they work there, else the plain ones; one log line says why."""
    if device.type != "cuda":
        return Kernels()
    try:
        from continuar.sampling.fast.triton_kernels import TritonKernels

        fused = TritonKernels()
        with matmul_precision("highest"):
            error = largest_difference(fused, device)
        if error < 1e-3:
            return fused
        reason = f"they are {error:.2g} away from the plain ones on {device}"
    except Exception as problem:  # Triton may be missing, or fail to compile in many ways; the plain kernels always work.
        reason = f"{type(problem).__name__}: {problem}".split("\n", maxsplit=1)[0]
    _LOG.warning("the sampling loop runs without fused kernels (%s)", reason)
    return Kernels()


class FastEngine:
    """Generates with captured graphs and fused kernels. Every generation uses the model's weights as they are when it begins.

    Args:
        model: in evaluation mode, float32.
        precision: "float32", or "bfloat16" for the transformer and all matrix products.
        kernels: fused or plain operations; None: the best for the device.
        strict: raise the error of a failed capture instead of launching kernels one by one.

    Attributes:
        clock: if set, measures the parts of generations that begin from then on.

    Raises:
        UserError: a model that the engine cannot run, or an unknown precision.
    """

    def __init__(
        self, model: TokenModel, precision: Precision = "float32", *, kernels: Kernels | None = None, strict: bool = False
    ) -> None:
        reason = unsupported_reason(model)
        require(reason is None, f"engine is 'fast', but {reason}; allowed: eager")
        require(precision in DTYPES, f"precision is '{precision}'; allowed: {', '.join(DTYPES)}")
        assert isinstance(model, Model)
        self.model, self.device = model, next(model.parameters()).device
        self._weights = EngineWeights(model, precision)
        self.kernels = kernels or best_kernels(self.device)
        self._strict, self._idle = strict, deque[StaticBuffers]()
        self.clock: Clock | None = None

    @torch.no_grad()
    def stream(
        self, inputs: SamplingInput, options: SamplingOptions, *, order_BN: Tensor | None = None, noise_of: NoiseOf = KeyedNoise
    ) -> Iterator[Progress]:
        """Yields after every autoregressive step; arguments as in `generate.stream`.

        Raises:
            UserError: as in `generate.stream`, or a batch that does not fit the GPU's memory.
        """
        with self._precision():
            self._weights.refresh()
            batch = prepare_batch(self.model, inputs, options, order_BN)
            buffers = self._acquire(batch)
        try:
            with self._precision():
                buffers.begin(batch, inputs.seeds_B, self.clock)
            for number, step in enumerate(batch.plan):
                with self._precision():
                    values = buffers.run_step(batch, step, noise_of)
                    index = batch.order_BN[:, step.start : step.start + step.size]
                    batched_scatter_(batch.tokens, index, values)
                    batch.known_BN.scatter_(1, index, True)
                    buffers.limit_host_lead()
                yield Progress(batch.tokens, batch.known_BN, number, len(batch.plan))
        except torch.OutOfMemoryError as problem:
            count = len(inputs.seeds_B)
            raise UserError(f"out of memory with a batch of {count} images; allowed: fewer, try {max(1, count // 2)}") from problem
        finally:
            self._release(buffers)

    def generate(
        self, inputs: SamplingInput, options: SamplingOptions, *, order_BN: Tensor | None = None, noise_of: NoiseOf = KeyedNoise
    ) -> Tensor:
        """All tokens of a batch. Known tokens come back unchanged."""
        tokens = inputs.tokens
        for progress in self.stream(inputs, options, order_BN=order_BN, noise_of=noise_of):
            tokens = progress.tokens
        return tokens

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """The engine's own precision: no autocast; with bfloat16, products that stay float32 may use TF32.

        It is entered for each step and left before each yield, so that the caller's settings hold in the caller's code.
        """
        level = torch.get_float32_matmul_precision() if self._weights.dtype == torch.float32 else "high"
        with torch.autocast(self.device.type, enabled=False), matmul_precision(level):
            yield

    def _acquire(self, batch: PreparedBatch) -> StaticBuffers:
        shape = _shape(batch)
        for buffers in self._idle:
            if buffers.shape == shape and buffers.version == self._weights.version:
                self._idle.remove(buffers)
                return buffers
        if self.device.type != "cuda":
            return StaticBuffers(self._weights, batch, self.kernels, Graphs(None, self._strict))
        assert batch.options.head is not None
        each = bytes_per_image(self.model, batch.plan, batch.options.head, batch.copies, self._weights.dtype)
        if shape[0] > fitting_images(each, free_bytes(self.device)):
            # The idle buffers' graphs hold memory that this batch needs.
            self._idle.clear()
            check_fits(shape[0], each, free_bytes(self.device))
        return StaticBuffers(self._weights, batch, self.kernels, Graphs(GraphPool(self.device), self._strict))

    def _release(self, buffers: StaticBuffers) -> None:
        if buffers.version == self._weights.version:
            self._idle.append(buffers)
        if len(self._idle) > MAX_IDLE:
            self._idle.popleft()


def _shape(batch: PreparedBatch) -> tuple[int, int, int]:
    """(images, copies, condition tokens)."""
    return len(batch.order_BN), batch.copies, batch.cond.shape[1]


class _HeadBuffers:
    """Inputs and outputs of the head for one number of tokens per image: G copies, R rows, Z condition width."""

    def __init__(self, batch: PreparedBatch, size: int, z_dim: int) -> None:
        rows, device = len(batch.order_BN) * size, batch.order_BN.device
        self.z_GRZ = torch.empty(batch.copies, rows, z_dim, device=device)
        self.seeds, self.positions = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.tokens = batch.tokens.new_empty(rows, *batch.tokens.shape[2:])


class StaticBuffers:
    """The tensors of a generation of one batch shape, and the graphs that read and write them."""

    def __init__(self, weights: EngineWeights, batch: PreparedBatch, kernels: Kernels, graphs: Graphs) -> None:
        self.shape, self.version = _shape(batch), weights.version
        self._model, self._kernels, self._graphs = weights.exact, kernels, graphs
        backbone, device = weights.fast.backbone, batch.order_BN.device
        kind: Any = FastMAE if isinstance(backbone, MAE) else FastCausal
        self._backbone: FastMAE | FastCausal = kind(backbone, *self.shape, kernels)
        # In bfloat16, the parts of the head that stay float32 use the model's own weights.
        self._exact_head: Any = weights.fast.head if weights.dtype == torch.float32 else weights.exact.head
        self._fast_head: Any = weights.fast.head
        self._scale, self._temperature = torch.empty((), device=device), torch.empty((), device=device)
        self._heads: dict[int, _HeadBuffers] = {}
        self._loops: dict[DiffusionOptions, FastDiffusion] = {}
        self._events: deque[torch.cuda.Event] = deque()

    def begin(self, batch: PreparedBatch, seeds_B: Tensor, clock: Clock | None) -> None:
        """Starts a generation: writes the conditions and commits the known tokens."""
        self._seeds, self._graphs.clock = seeds_B, clock
        self._temperature.fill_(batch.options.temperature)
        self._backbone.prepare(batch.cond, batch.order_BN)
        self._events.clear()
        if batch.known:
            self._commit(0, batched_gather(batch.tokens, batch.order_BN[:, : batch.known]))

    def run_step(self, batch: PreparedBatch, step: PlanStep, noise_of: NoiseOf) -> Tensor:
        """Predicts and commits the tokens of one step, [B, size, D] or ids [B, size]."""
        known, size = step.start, step.size
        if size not in self._heads:
            self._heads[size] = _HeadBuffers(batch, size, self._model.backbone.z_dim)
        head, backbone = self._heads[size], self._backbone
        backbone.set_step(known)

        def predict() -> None:
            head.z_GRZ.copy_(backbone.predict(known, size).view(head.z_GRZ.shape))

        self._graphs.run(("transformer", *backbone.key(known, size)), predict)
        head.seeds.copy_(self._seeds.repeat_interleave(size))
        head.positions.copy_(batch.order_BN[:, known : known + size].flatten())
        # Scale and temperature are tensors, because a captured graph would repeat the numbers of its first run.
        self._scale.fill_(step.scale)
        if noise_of is KeyedNoise:
            key = ("head", size, batch.options.head)
            self._graphs.run(key, lambda: self._draw(head, batch.options, KeyedNoise(head.seeds, head.positions)))
        else:
            self._draw(head, batch.options, noise_of(head.seeds, head.positions))
        values = head.tokens.unflatten(0, (-1, size))
        self._commit(known, values)
        return values

    def _draw(self, buffers: _HeadBuffers, options: SamplingOptions, noise: RowNoise) -> None:
        z, head, head_options = buffers.z_GRZ, self._exact_head, options.head
        if isinstance(head, DiffusionHead):
            assert isinstance(head_options, DiffusionOptions)
            if head_options not in self._loops:
                self._loops[head_options] = FastDiffusion(head, self._fast_head, head_options, self._kernels)
            tokens = self._loops[head_options].draw(z, self._scale, self._temperature, noise)
        else:
            guidance = Guidance(z[1], self._scale) if len(z) == 2 else None
            tokens = head.draw(z[0], options=head_options, temperature=self._temperature, noise=noise, guidance=guidance).tokens
        buffers.tokens.copy_(tokens)

    def _commit(self, first: int, values: Tensor) -> None:
        self._backbone.commit(first, self._model.token_embedding(values))

    def limit_host_lead(self) -> None:
        """Waits if the host is more than `STEPS_AHEAD` steps ahead of the GPU.

        Otherwise the host would queue all steps ahead: progress would come too early, and an interruption would take effect late.
        """
        if self._seeds.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > STEPS_AHEAD:
                self._events.popleft().synchronize()
