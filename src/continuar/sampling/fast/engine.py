"""The fast engine: what `eager` computes, faster and equal to it. Where nothing else is said, arguments are as there.

1. The backbone keeps buffers in the order of generation (`fast_mae`) or decodes by one step of fixed shapes (`fast_causal`).
2. The diffusion head's loop touches only what depends on x_t (`fast_head`); other heads draw as they are.
3. On CUDA both are captured, the backbone per number of known and predicted tokens, the head per number of rows, and replayed as
   one launch each (`capture`); a CPU computes with packed weights (`packed`). Nothing reads back to the host; so that progress is
   honest and an interruption stops soon, the host waits where it is two steps ahead.

Tensors of one generation lie in a `_Desk`, to which graphs are bound. A desk is in use by one generation at a time and kept for
the next of its shape.

bfloat16 differs from autocast in that the transformer's residual stream is bfloat16 too; the sampler's state is float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
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
from continuar.sampling.fast.kernels import Kernels, best_kernels
from continuar.sampling.fast.mar import FastMAE
from continuar.sampling.fast.weights import DTYPES, Precision, Weights
from continuar.sampling.generate import NoiseOf, PreparedBatch, Progress, SamplingInput, SamplingOptions, prepare
from continuar.sampling.memory import bytes_per_image, check_fits, fits, free_bytes
from continuar.tensors import batched_gather, batched_scatter_, matmul_precision

IDLE_DESKS = 4
"""Shapes whose tensors and graphs are kept while nobody generates with them."""
STEPS_AHEAD = 2


def why_not(model: TokenModel) -> str | None:
    """Why the engine cannot run a model, or None."""
    if not isinstance(model, Model):
        return f"a {model.config.kind} has no fast form"
    if model.order.chooses:
        return f"the {model.config.order.kind} order decides positions while it generates"
    if not isinstance(model.backbone, MAE | Causal):
        return f"the {model.config.backbone.kind} backbone has no fast form"
    if model.config.backbone.positions != "learned":
        return f"{model.config.backbone.positions} positions have no fast form"
    return None


class FastEngine:
    """See the module's docstring. Weights are read anew where the model's have changed.

    Args:
        model: in evaluation mode, float32.
        precision: "float32", or "bfloat16" for the matrix products and the transformer.
        kernels: fused or plain operations; None: the best there are.
        strict: raise what a capture raises, instead of going on without.

    Attributes:
        clock: measures the parts of generations that begin while it is set.

    Raises:
        UserError: a model it cannot run, or another precision.
    """

    def __init__(
        self, model: Model, precision: Precision = "float32", *, kernels: Kernels | None = None, strict: bool = False
    ) -> None:
        reason = why_not(model)
        require(reason is None, f"engine is 'graphs', but {reason}; allowed: eager")
        require(precision in DTYPES, f"precision is '{precision}'; allowed: {', '.join(DTYPES)}")
        self.model, self.device = model, next(model.parameters()).device
        self._weights = Weights(model, precision)
        self.kernels = kernels or best_kernels(self.device)
        self._strict, self._idle = strict, deque[_Desk]()
        self.clock: Clock | None = None

    @torch.no_grad()
    def stream(
        self, start: SamplingInput, options: SamplingOptions, *, order_BN: Tensor | None = None, noise_of: NoiseOf = KeyedNoise
    ) -> Iterator[Progress]:
        """Yields after every autoregressive step.

        Raises:
            UserError: as of `eager.stream`, or a batch that does not fit the GPU's memory.
        """
        with self._computing():
            self._weights.refresh()
            begun = prepare(self.model, start, options, order_BN)
            desk = self._take(begun)
        try:
            with self._computing():
                desk.prepare(begun, start.seeds_B, self.clock)
            for number, step in enumerate(begun.plan):
                with self._computing():
                    values = desk.step(begun, step.start, step.size, step.scale, noise_of)
                    index = begun.order_BN[:, step.start : step.start + step.size]
                    batched_scatter_(begun.tokens, index, values)
                    begun.known_BN.scatter_(1, index, True)
                    desk.wait()
                yield Progress(begun.tokens, begun.known_BN, number, len(begun.plan))
        except torch.OutOfMemoryError as problem:
            raise UserError(
                f"out of memory with a batch of {len(start.seeds_B)} images; allowed: fewer, try {max(1, len(start.seeds_B) // 2)}"
            ) from problem
        finally:
            self._give_back(desk)

    def generate(
        self, start: SamplingInput, options: SamplingOptions, *, order_BN: Tensor | None = None, noise_of: NoiseOf = KeyedNoise
    ) -> Tensor:
        """All tokens of a batch. Known tokens come back unchanged."""
        tokens = start.tokens
        for progress in self.stream(start, options, order_BN=order_BN, noise_of=noise_of):
            tokens = progress.tokens
        return tokens

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Precision is the engine's own: no autocast, and with bfloat16 what stays float32 may be multiplied as TF32."""
        level = torch.get_float32_matmul_precision() if self._weights.dtype == torch.float32 else "high"
        with torch.autocast(self.device.type, enabled=False), matmul_precision(level):
            yield

    def _take(self, begun: PreparedBatch) -> _Desk:
        shape = _shape(begun)
        for desk in self._idle:
            if desk.shape == shape and desk.made == self._weights.made:
                self._idle.remove(desk)
                return desk
        if self.device.type == "cuda":
            assert begun.options.head is not None
            each = bytes_per_image(self.model, begun.plan, begun.options.head, begun.copies, self._weights.dtype)
            if not fits(len(begun.order_BN), each, free_bytes(self.device)):
                self._idle.clear()
            check_fits(len(begun.order_BN), each, free_bytes(self.device))
        pool = GraphPool(self.device) if self.device.type == "cuda" else None
        return _Desk(self._weights, begun, self.kernels, Graphs(pool, self._strict))

    def _give_back(self, desk: _Desk) -> None:
        if desk.made == self._weights.made:
            self._idle.append(desk)
        while len(self._idle) > IDLE_DESKS:
            self._idle.popleft()


def _shape(begun: PreparedBatch) -> tuple[int, ...]:
    return len(begun.order_BN), begun.copies, begun.cond.shape[1]


class _Rows:
    """What a head reads and writes for one number of tokens per image: B images, size q, G copies."""

    def __init__(self, begun: PreparedBatch, size: int, z_dim: int) -> None:
        rows, device = len(begun.order_BN) * size, begun.order_BN.device
        self.z_GRZ = torch.empty(begun.copies, rows, z_dim, device=device)
        self.seeds, self.positions = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.tokens = begun.tokens.new_empty(rows, *begun.tokens.shape[2:])


class _Desk:
    """The tensors of a generation of one shape, and the graphs bound to them."""

    def __init__(self, weights: Weights, begun: PreparedBatch, kernels: Kernels, graphs: Graphs) -> None:
        self.shape, self.made = _shape(begun), weights.made
        self._model, self._kernels, self._graphs = weights.exact, kernels, graphs
        backbone, device = weights.fast.backbone, begun.order_BN.device
        kind: Any = FastMAE if isinstance(backbone, MAE) else FastCausal
        self._backbone: FastMAE | FastCausal = kind(backbone, *self.shape, kernels)
        low = weights.dtype != torch.float32
        # In bfloat16, what must stay exact runs on the model's own head.
        self._exact_head: Any = weights.exact.head if low else weights.fast.head
        self._fast_head: Any = weights.fast.head
        self._scale, self._temperature = torch.empty((), device=device), torch.empty((), device=device)
        self._rows: dict[int, _Rows] = {}
        self._draws: dict[DiffusionOptions, FastDiffusion] = {}
        self._events: deque[torch.cuda.Event] = deque()

    def prepare(self, begun: PreparedBatch, seeds_B: Tensor, clock: Clock | None) -> None:
        """A new generation on this desk."""
        self._seeds, self._graphs.clock = seeds_B, clock
        self._temperature.fill_(begun.options.temperature)
        self._backbone.prepare(begun.cond, begun.order_BN)
        self._events.clear()
        if begun.known:
            self._commit(0, batched_gather(begun.tokens, begun.order_BN[:, : begun.known]))

    def step(self, begun: PreparedBatch, known: int, size: int, scale: float, noise_of: NoiseOf) -> Tensor:
        """Tokens [B, size, D] or ids [B, size] of the places behind the ``known`` ones, which are committed too."""
        if size not in self._rows:
            self._rows[size] = _Rows(begun, size, self._model.backbone.z_dim)
        rows, backbone = self._rows[size], self._backbone
        backbone.aim(known)
        self._graphs.run(
            ("transformer", *backbone.key(known, size)),
            lambda: _copy(rows.z_GRZ, backbone.predict(known, size).view(rows.z_GRZ.shape)),
        )
        rows.seeds.copy_(self._seeds.repeat_interleave(size))
        rows.positions.copy_(begun.order_BN[:, known : known + size].flatten())
        self._scale.fill_(scale)
        if noise_of is KeyedNoise:
            key = ("head", size, begun.options.head)
            self._graphs.run(key, lambda: self._draw(rows, begun.options, KeyedNoise(rows.seeds, rows.positions)))
        else:
            self._draw(rows, begun.options, noise_of(rows.seeds, rows.positions))
        values = rows.tokens.unflatten(0, (-1, size))
        self._commit(known, values)
        return values

    def _draw(self, rows: _Rows, options: SamplingOptions, noise: RowNoise) -> None:
        z, head, of_head = rows.z_GRZ, self._exact_head, options.head
        if isinstance(head, DiffusionHead):
            assert isinstance(of_head, DiffusionOptions)
            if of_head not in self._draws:
                self._draws[of_head] = FastDiffusion(head, self._fast_head, of_head, self._kernels)
            drawn = self._draws[of_head].draw(z, self._scale, self._temperature, noise)
        else:
            guidance = Guidance(z[1], self._scale) if len(z) == 2 else None
            drawn = head.draw(z[0], options=of_head, temperature=self._temperature, noise=noise, guidance=guidance).tokens
        rows.tokens.copy_(drawn)

    def _commit(self, first: int, values: Tensor) -> None:
        self._backbone.commit(first, self._model.token_embedding(values))

    def wait(self) -> None:
        """Lets the host be no more than `STEPS_AHEAD` steps ahead of the device."""
        if self._seeds.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > STEPS_AHEAD:
                self._events.popleft().synchronize()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
