"""FLOPs of a model, counted on the meta device: nothing is computed or allocated. A multiply-add is two.

Memory of a training step, counted on the meta device: what autograd saves, not what someone guesses.

1. Run the loss on the meta device, with hooks on every tensor that autograd saves for backward; each storage counts once.
2. What the meta device would do in its own way is done as a GPU does it: attention saves no matrix of weights, dropout saves a mask
   of bytes, and under bfloat16 autocast matrix products cast their inputs and layer norms compute in float32.
3. Where blocks are recomputed, what counts is what is saved outside of them, their inputs, and of one block at a time what is saved
   inside it; the block that needs most decides.
4. Do it for two batch sizes: activations are linear in the batch, and what does not grow is copies of weights
   and embedded timesteps.

What a run costs on so many GPUs: memory, days, network, disk. Arithmetic, but for activations, which are counted (`memory`).

Per GPU, of P parameters on W GPUs, in bytes:

* weights 4P, gradients 4P, the optimizer's moments 8P, every average 4P; a W-th of each under FSDP.
* Engines that capture CUDA graphs replay them in a memory pool that all graphs share: one set of activations, the largest. Before
  they are captured all masked counts warm up, one after another, in memory that is given back. Inputs have places of their own, and
  gradients are set aside while that lasts.
* Under FSDP also what is gathered while it is used: the head and what lies outside of blocks, and the matrices of two blocks, one
  in use and one on its way, with their gradients.
* Network: DDP sends and receives 2 (W - 1)/W of the gradients per step (ring all-reduce). FSDP gathers weights for forward and for
  backward of every micro-batch, and scatters every micro-batch's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from continuar.distributed import GIB, Kind
from continuar.errors import UserError, require
from continuar.heads import DiffusionOptions, Head
from continuar.heads.base import Guidance
from continuar.models.autoregressive import Model, ModelConfig
from continuar.models.base import TokenModel
from continuar.models.dit import DiT, DiTConfig
from continuar.models.transformer import Block
from continuar.noise import KeyedNoise
from continuar.orders import View
from continuar.sampling.generate import make_plan
from continuar.sampling.options import SamplingOptions
from continuar.tensors import META_AUTOCAST, meta_autocast
from continuar.tokenizers import CodebookConfig, LatentConfig, PixelConfig, VAEConfig
from continuar.training.config import BaseRun


def training_flops(config: ModelConfig | DiTConfig, activation_checkpointing: bool = False) -> float:
    """Per image and step: forward and backward (twice the forward) at the mean number of masked tokens.

    Args:
        recompute: blocks go forward once more (`LoopConfig.recompute`).
    """
    with torch.device("meta"):
        model = config.build()
        spec = config.tokens
        queried = min(spec.seq_len, round(model.mean_num_masked()))
        view = View(torch.zeros(COUNTED, spec.seq_len, dtype=torch.int64), spec.seq_len - queried)
        again = 0
        with FlopCounterMode(display=False) as counter:

            def enter(block: nn.Module, given: Any) -> None:
                nonlocal again
                again -= counter.get_total_flops()

            def leave(block: nn.Module, given: Any, out: Any) -> None:
                nonlocal again
                again += counter.get_total_flops()

            for block in (m for m in model.modules() if isinstance(m, Block) and activation_checkpointing):
                block.register_forward_pre_hook(enter)
                block.register_forward_hook(leave)
            model.loss(spec.blank(COUNTED), None, view)
    return (3.0 * counter.get_total_flops() + again) / COUNTED


def generation_flops(config: ModelConfig | DiTConfig, options: SamplingOptions) -> float:
    """Per image: the backbone at every step and the head for every token, both halves of each if guided; or all of a DiT as often
    as it denoises."""
    with torch.device("meta"):
        model = config.build().eval()
        if isinstance(model, DiT):
            return _dit_flops(model, options)
        plan = make_plan(model.order, options, config.tokens.seq_len)
        # Attention makes a backbone step at most quadratic in the number of known tokens: three points determine it.
        points = [0, config.tokens.seq_len // 2, config.tokens.seq_len - 1]
        curve = np.polyfit(points, [_backbone_flops(model, known) for known in points], 2)
        backbone = sum(float(np.polyval(curve, step.start)) for step in plan)
        guided = options.guidance_scale != 1.0
        head = _head_flops(model, options.for_head(config), guided)
        return backbone * (2 if guided else 1) + head * config.tokens.seq_len


def _dit_flops(model: DiT, options: SamplingOptions) -> float:
    """Denoising one image."""
    options, zero = options.for_head(model.config), torch.zeros(1, dtype=torch.int64)
    assert isinstance(options.head, DiffusionOptions)
    with FlopCounterMode(display=False) as counter:
        model(model.config.tokens.blank(1), zero, zero)
    return float(counter.get_total_flops()) * options.head.diffusion_steps * (2 if options.guidance_scale != 1.0 else 1)


def _backbone_flops(model: Model, known: int) -> int:
    """One evaluation for one image with ``known`` known tokens."""
    spec = model.config.tokens
    index = torch.zeros(1, spec.seq_len, dtype=torch.int64)
    state = model.backbone.start(model.condition.null(1), spec.seq_len)
    if known:
        model.backbone.commit(state, index[:, :known], torch.zeros(1, known, model.backbone.width))
    with FlopCounterMode(display=False) as counter:
        model.backbone.predict(state, index[:, :1])
    return counter.get_total_flops()


def _head_flops(model: Model, options: SamplingOptions, guided: bool) -> int:
    """Drawing one token."""
    z, row = torch.zeros(1, model.backbone.z_dim), torch.zeros(1, dtype=torch.int64)
    scalar = torch.tensor(1.0)
    with FlopCounterMode(display=False) as counter:
        model.head.draw(
            z,
            options=options.head,
            temperature=scalar,
            noise=KeyedNoise(row, row),
            guidance=Guidance(z, scalar) if guided else None,
        )
    return counter.get_total_flops()


COUNTED = 1024
"""Images of a batch whose costs are counted: enough for it to go the way of large ones (few rows embed timesteps one by one)."""


@dataclass(frozen=True)
class Activations:
    """Bytes of what a forward pass leaves for backward, at the number of masked tokens that needs most."""

    per_image: float
    copies: float
    """bfloat16 copies of weights, and embedded timesteps: the same for every batch."""
    largest: float
    """Of ``per_image``, the largest single tensor: its gradient is there at the same time."""


def activations(model: TokenModel, bf16: bool, activation_checkpointing: bool = False) -> Activations:
    """What a forward pass of a model on the meta device saves, over the extremes of the number of masked tokens.

    Args:
        recompute: blocks are computed again in backward (`LoopConfig.recompute`).
    """
    counts = model.num_masked_distribution()
    found = [_activations(model, queried, bf16, activation_checkpointing) for queried in {min(counts), max(counts)}]
    return max(found, key=lambda a: a.per_image + a.largest)


def _activations(model: TokenModel, queried: int, bf16: bool, activation_checkpointing: bool) -> Activations:
    few, many = COUNTED, 2 * COUNTED
    (small, small_largest), (large, large_largest) = (
        saved(model, batch, queried, bf16, activation_checkpointing) for batch in (few, many)
    )
    per_image = (large - small) / (many - few)
    copies = small - few * per_image
    if activation_checkpointing:  # autocast keeps those of all blocks to the end of forward
        copies = _activations(model, queried, bf16, activation_checkpointing=False).copies
    return Activations(per_image, copies, (large_largest - small_largest) / (many - few))


def saved(model: TokenModel, batch: int, queried: int, bf16: bool, activation_checkpointing: bool = False) -> tuple[int, int]:
    """(bytes, bytes of the largest) of the storages that a forward pass of ``batch`` images saves, without the weights'."""
    outside: dict[int, torch.UntypedStorage] = {}
    inside: list[dict[int, torch.UntypedStorage]] = []
    within = [outside]  # the last one is of what is running

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        within[-1][id(storage)] = storage
        return tensor

    def enter(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        pack(given[0])
        inside.append({})
        within.append(inside[-1])

    def leave(block: nn.Module, given: Any, out: Tensor) -> None:
        within.pop()

    spec, model = model.config.tokens, model.train()
    blocks = [m for m in model.modules() if isinstance(m, Block)] if activation_checkpointing else []
    hooks = [hook for b in blocks for hook in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor), AsOnGPU(), meta_autocast(bf16):
        view = View(torch.zeros(batch, spec.seq_len, dtype=torch.int64), spec.seq_len - queried)
        loss = model.loss(spec.blank(batch), torch.zeros(batch, dtype=torch.int64), view, 0.1).mean()
    assert loss.is_meta
    for hook in hooks:
        hook.remove()
    weights = {id(p.untyped_storage()) for p in model.parameters()}

    def sizes(found: dict[int, torch.UntypedStorage], known: Collection[int] = ()) -> list[int]:
        return [s.nbytes() for key, s in found.items() if key not in weights and key not in known]

    kept, again = sizes(outside), max((sizes(one, outside) for one in inside), key=sum, default=[])
    return sum(kept) + sum(again), max([*kept, *again])


class AsOnGPU(TorchFunctionMode):
    """See the module's docstring, 2."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if func is F.dropout:
            x, p, training = args[0], kwargs.get("p", 0.5), kwargs.get("training", True)
            return _Dropout.apply(x) if training and p > 0 else x
        if META_AUTOCAST.get() and func is F.linear:
            return func(*(self._low(x) for x in args))
        if func is F.layer_norm and (META_AUTOCAST.get() or torch.is_autocast_enabled("cpu")):
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _low(self, x: Tensor | None) -> Tensor | None:
        """A bfloat16 copy; of a weight, one for all its uses."""
        if x is None or x.dtype == torch.bfloat16:
            return x
        if not x.is_leaf:
            return x.bfloat16()
        if id(x) not in self._copies:
            self._copies[id(x)] = x.bfloat16()
        return self._copies[id(x)]


class _Attention(torch.autograd.Function):
    """What flash attention saves: inputs, output, and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only what is saved is counted")


class _Dropout(torch.autograd.Function):
    """What fused dropout saves: a mask of bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only what is saved is counted")


HEADROOM = 0.92
"""The share of a GPU's memory that is planned with; the rest is the allocator's, the libraries' and NCCL's."""


@dataclass(frozen=True)
class Machine:
    """GPUs of the planned run."""

    gpus: int = 1
    """Number of GPUs."""
    gpu_memory: float = 80.0
    """Memory of each GPU in GiB."""
    tflops: float = 989.0
    """Peak of each GPU in bfloat16, TFLOP/s; an H100 or H200 has 989."""
    utilisation: float = 0.4
    """Share of the peak that training reaches, above 0 to 1; `benchmarks/training.py` measures it."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, f"gpus is {self.gpus}; allowed: 1 or more")
        for name in ("gpu_memory", "tflops"):
            require(0 < getattr(self, name) < float("inf"), f"{name} is {getattr(self, name)}; allowed: above 0")
        require(0 < self.utilisation <= 1, f"utilisation is {self.utilisation}; allowed: above 0 to 1")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU while it trains."""

    parts: dict[str, float]
    per_image: float
    """Activations of one image of a micro-batch."""

    def total(self, micro_batch: int) -> float:
        """Of everything."""
        return sum(self.parts.values()) + self.per_image * micro_batch

    def fits(self, gib: float, share: int) -> int:
        """The largest micro-batch that fits a GPU of so many GiB and divides its share of the batch; 0 if none does."""
        room = int((HEADROOM * gib * GIB - sum(self.parts.values())) // self.per_image)
        return max((size for size in range(1, min(room, share) + 1) if share % size == 0), default=0)


@dataclass(frozen=True)
class Plan:
    """See the module's docstring; sizes in bytes."""

    parameters: int
    flops_per_image: float
    micro_batch: int
    """Images of one forward and backward on one GPU."""
    accumulated: int
    """Micro-batches per step and GPU."""
    days: float
    memory: dict[Kind, Memory] = field(default_factory=dict)
    network: dict[Kind, float] = field(default_factory=dict)
    """Sent per GPU and step; as much is received."""
    cached: bool = False
    """Whether the data is a cache of latents on disk; else pixels are held by every GPU."""
    data_per_image: int = 0
    """Of either."""


def estimate_run(run: BaseRun, classes: int, machine: Machine) -> Plan:
    """The plan of a run.

    Raises:
        UserError: the GPUs cannot share the batch evenly.
    """
    config, loop, gpus = run.model_config(classes), run.train, machine.gpus
    share, rest = divmod(loop.batch_size, gpus)
    require(rest == 0, f"{gpus} processes for a batch of {loop.batch_size}; allowed: a number of processes that divides it")
    micro_batch = loop.micro_batch or share
    allowed = f"allowed: a divisor of {share}, the batch of one of {gpus} GPUs"
    require(share % micro_batch == 0, f"train.micro_batch is {micro_batch}; {allowed}")
    cached, data_per_image = _data_per_image(run)
    with torch.device("meta"):
        model = config.build()
    flops = training_flops(config, loop.activation_checkpointing)
    bf16 = run.train.precision != "float32"
    seconds = loop.steps * loop.batch_size * flops / (gpus * machine.tflops * 1e12 * machine.utilisation)
    return Plan(
        parameters=_count(model),
        flops_per_image=flops,
        micro_batch=micro_batch,
        accumulated=share // micro_batch,
        days=seconds / 86_400,
        memory=_memory(run, model, gpus, micro_batch, bf16),
        network=_network(model, gpus, share // micro_batch, bf16),
        cached=cached,
        data_per_image=data_per_image,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class _Groups:
    """Parameters by what FSDP gathers together: the matrices of blocks, the head, and what is left."""

    blocks: list[int]
    head: int
    rest: int

    @classmethod
    def of(cls, model: TokenModel) -> _Groups:
        blocks = [_count(m.attention) + _count(m.mlp) for m in model.modules() if isinstance(m, Block)]
        head = sum(_count(m) for m in model.modules() if isinstance(m, Head))
        return cls(blocks, head, _count(model) - sum(blocks) - head)


def _memory(run: BaseRun, model: TokenModel, gpus: int, micro_batch: int, bf16: bool) -> dict[Kind, Memory]:
    size, groups, low = 4.0 * _count(model), _Groups.of(model), 2 if bf16 else 4
    found = activations(model, bf16, run.train.activation_checkpointing)
    averages = 1 + (len(run.ema.lengths) if run.ema.snapshot_images else 0)
    kept = {"weights": size, "gradients": size, "optimizer": 2 * size, "averages": averages * size}
    gathered = 4 * (groups.head + groups.rest) + 2 * max(groups.blocks, default=0) * (low + 4) + (2 * groups.head if bf16 else 0)
    per_image = found.per_image + found.largest
    fsdp = Memory({**{name: x / gpus for name, x in kept.items()}, "copies of weights": gathered}, per_image)
    ddp = {**kept, "copies of weights": found.copies}
    if run.train.engine.endswith("graphs"):
        ddp["inputs and gradients of graphs"] = size + micro_batch * _input_bytes(model)
    return {"ddp": Memory(ddp, per_image), "fsdp": fsdp}


def _input_bytes(model: TokenModel) -> int:
    """Tokens, label and order of one image."""
    spec = model.config.tokens
    return spec.seq_len * (4 * spec.dim if spec.kind == "vector" else 8) + 8 + 8 * spec.seq_len


def _network(model: TokenModel, gpus: int, accumulated: int, bf16: bool) -> dict[Kind, float]:
    groups, low = _Groups.of(model), 2 if bf16 else 4
    away = (gpus - 1) / gpus
    gathered = 2 * (low * sum(groups.blocks) + 4 * groups.head) + 4 * groups.rest
    return {"ddp": 2 * away * 4 * _count(model), "fsdp": away * accumulated * (gathered + 4 * _count(model))}


def _data_per_image(run: BaseRun) -> tuple[bool, int]:
    """(whether it is cached as latents, bytes of it)."""
    tokenizer, spec = run.tokenizer, run.tokenizer.spec
    if isinstance(tokenizer, PixelConfig | CodebookConfig):
        return False, 3 * tokenizer.image_size**2
    numbers = spec.seq_len * (1 if spec.kind == "id" else spec.dim)
    moments = isinstance(tokenizer, LatentConfig) or (isinstance(tokenizer, VAEConfig) and tokenizer.network.has_variance)
    size = 4 if spec.kind == "id" else 2  # int32, or bfloat16 of mean and, where there is one, log variance
    return True, numbers * size * (2 if moments else 1) * (2 if run.data.flip else 1)


def out_of_memory(run: BaseRun, classes: int, gpus: int, kind: Kind, gib: float | None) -> UserError:
    """What to say when a GPU of ``gib`` GiB (None: not known) had too little memory for this run."""
    plan = estimate_run(run, classes, Machine(gpus=gpus))
    fits = plan.memory[kind].fits(gib, plan.micro_batch) if gib else 0
    if 0 < fits < plan.micro_batch:
        advice = f"by the estimate of `continuar plan`, {fits} fit into {HEADROOM:.0%} of {gib:.0f} GiB: --train.micro-batch {fits}"
    elif plan.micro_batch > 1:
        half = max(size for size in range(1, plan.micro_batch // 2 + 1) if plan.micro_batch % size == 0)
        advice = f"try --train.micro-batch {half}"
    else:
        advice = "there is nothing smaller; spread the weights: --parallel fsdp on more GPUs"
    forced = "a run that has begun needs --resume --force for it: other micro-batches draw other numbers"
    return UserError(f"out of memory with micro-batches of {plan.micro_batch}; {advice} ({forced})")
