"""What a run costs on so many GPUs: memory, days, network, disk. Arithmetic, but for activations, which are counted (`memory`).

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

from dataclasses import dataclass, field

import torch

from continuar.backbones.blocks import Block
from continuar.devices import GIB
from continuar.errors import UserError, require
from continuar.heads import Head
from continuar.token_model import TokenModel
from continuar.tokenizers import CodebookConfig, LatentConfig, PixelConfig, VAEConfig
from continuar.training.config import BaseRun
from continuar.training.flops import training_flops
from continuar.training.memory import activations
from continuar.training.parallel import Kind

HEADROOM = 0.92
"""The share of a GPU's memory that is planned with; the rest is the allocator's, the libraries' and NCCL's."""


@dataclass(frozen=True)
class Machine:
    """The GPUs a run is planned for."""

    gpus: int = 1
    """How many."""
    gpu_memory: float = 80.0
    """GiB of each."""
    tflops: float = 989.0
    """Its peak in bfloat16, 10^12 per second; 989 is an H100's or H200's."""
    utilisation: float = 0.4
    """The share of it that training reaches, 0 to 1: measure it, `benchmarks/training.py`."""

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


def make_plan(run: BaseRun, classes: int, machine: Machine) -> Plan:
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
    flops = training_flops(config, loop.recompute)
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
    found = activations(model, bf16, run.train.recompute)
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
    return spec.positions * (4 * spec.dim if spec.kind == "vector" else 8) + 8 + 8 * spec.positions


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
    numbers = spec.positions * (1 if spec.kind == "id" else spec.dim)
    moments = isinstance(tokenizer, LatentConfig) or (isinstance(tokenizer, VAEConfig) and tokenizer.network.has_variance)
    size = 4 if spec.kind == "id" else 2  # int32, or bfloat16 of mean and, where there is one, log variance
    return True, numbers * size * (2 if moments else 1) * (2 if run.data.flip else 1)


def out_of_memory(run: BaseRun, classes: int, gpus: int, kind: Kind, gib: float | None) -> UserError:
    """What to say when a GPU of ``gib`` GiB (None: not known) had too little memory for this run."""
    plan = make_plan(run, classes, Machine(gpus=gpus))
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
