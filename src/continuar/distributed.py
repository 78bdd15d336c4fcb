"""Several processes that train one model, on torch.distributed.

1. A global batch of B images is B/m micro-batches of m. Process r of W takes the r-th W-th part of them, one after another.
2. What a micro-batch draws is a function of (seed, step, its number in the global batch), and all micro-batches of a step hide the
   same number of tokens. So loss and gradient are plain means over micro-batches, and do not depend on W.
3. Gradients are averaged over processes while backward runs (after it, of tokenizers and where CUDA graphs replay it): `DDP`
   by DistributedDataParallel, every process with all weights; `FSDP` by FSDP2, each with a W-th part of weights, gradients,
   moments and averages.
4. Decisions (skip a step, stop, roll back) are taken on numbers that every process has.

`SingleProcess` is one process, in which all of this costs nothing.

EvaluationProcesses that share work through files of one directory, and torch.distributed (gloo) only to wait for one another.

Under torchrun every process sees RANK, WORLD_SIZE and where to meet; without it there is one.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from continuar.errors import RemoteRankError, UserError, require
from continuar.heads import Head
from continuar.models.base import TokenModel
from continuar.models.transformer import Block

Kind = Literal["ddp", "fsdp"]
TIMEOUT = timedelta(minutes=30)
"""For a process that is alive and does not answer, because the first draws samples, say. One that died is noticed at once."""
_LOST = re.compile("closed by peer|reset by peer|Broken pipe|refused|timed out|timeout|NCCL|gloo", re.IGNORECASE)


class SingleProcess:
    """One process, and what the others have in common.

    Attributes:
        rank, world: the process's number, and how many there are.
        sharded: whether weights are spread over the processes.
    """

    rank, world, sharded = 0, 1, False

    @property
    def first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def slots(self, micro_batches: int) -> range:
        """Which of a step's micro-batches are this process's.

        Raises:
            UserError: they cannot be shared out evenly.
        """
        require(
            micro_batches % self.world == 0,
            f"{self.world} processes for {micro_batches} micro-batches per step; allowed: a number of processes that divides "
            f"{micro_batches}, or another train.micro_batch",
        )
        each = micro_batches // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def part(self, batch_size: int) -> range:
        """Which of a batch's images are this process's.

        Raises:
            UserError: they cannot be shared out evenly.
        """
        allowed = "allowed: a number of processes that divides it"
        require(batch_size % self.world == 0, f"{self.world} processes for a batch of {batch_size}; {allowed}")
        each = batch_size // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def wrap(self, objective: nn.Module, bf16: bool) -> nn.Module:
        """The module whose backward averages gradients over the processes; its parameters may be others than before.

        Args:
            bf16: it is run under bfloat16 autocast.
        """
        return objective

    def shard(self, model: nn.Module) -> None:
        """Spreads the weights of a model that is never run, as `wrap` spreads those of the one that trains."""

    def syncing(self, objective: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one micro-batch: gradients travel at the ``last`` one."""
        return nullcontext()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every process's x, on the device."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of every process's x, on the device."""
        return x

    def most(self, value: int) -> int:
        """The largest of every process's value, on the host: a point that all processes reach together."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.most(int(flag)))

    def average(self, x: Tensor) -> None:
        """Overwrites x by the mean of every process's, on the device."""

    def average_all(self, tensors: list[Tensor]) -> None:
        """Overwrites tensors of one type by the means of every process's, which travel as one."""

    def share(self, tensors: list[Tensor]) -> None:
        """Overwrites tensors by the first process's."""


class DDP(SingleProcess):
    """See the module's docstring. Made by `joined`."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device

    def wrap(self, objective: nn.Module, bf16: bool) -> nn.Module:
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)

    def syncing(self, objective: nn.Module, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or not isinstance(objective, DistributedDataParallel) else objective.no_sync()

    def mean(self, x: Tensor) -> Tensor:
        return self.total(x) / self.world

    def total(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    def most(self, value: int) -> int:
        x = torch.tensor(value)  # on the CPU: hosts meet, and no device is waited for
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return int(x)

    def average(self, x: Tensor) -> None:
        dist.all_reduce(x)
        x /= self.world

    def average_all(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([x.flatten() for x in tensors])
        self.average(flat)
        means = flat.split([x.numel() for x in tensors])
        put = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        put(tensors, [mean.view_as(x) for mean, x in zip(means, tensors, strict=True)])

    def share(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class FSDP(DDP):
    """See the module's docstring. Made by `joined`.

    A transformer block's matrices are gathered when it runs, in bfloat16 where autocast would round them to it; the head's, whose
    time embedding and output layer compute in float32, in float32; and so is what is left, once for all.
    """

    sharded = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._mesh = init_device_mesh(device.type, (self.world,))
        # What modules return may be a view; nothing here changes it in place, which is what the warning warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    def wrap(self, objective: nn.Module, bf16: bool) -> nn.Module:
        self._spread(objective, torch.bfloat16 if bf16 else None)
        return objective

    def shard(self, model: nn.Module) -> None:
        self._spread(model, None)

    def _spread(self, root: nn.Module, matrices: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(param_dtype=matrices, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in [m for m in root.modules() if isinstance(m, Block | Head)]:
            if isinstance(module, Block):
                fully_shard([module.attention, module.mlp], mesh=self._mesh, mp_policy=policy)
            else:
                fully_shard(module, mesh=self._mesh)
        fully_shard(root, mesh=self._mesh)


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def gathered(x: Tensor) -> Tensor:
    """All of a sharded tensor, gathered by all processes together; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered_state(model: TokenModel, parallel: SingleProcess) -> dict[str, Tensor]:
    """A model's whole weights, on the CPU where they were sharded, in the first process; nothing in the others, which take part."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = gathered(tensor)
        if parallel.first:
            state[name] = full.cpu() if parallel.sharded else full
    return state


def gathered_model(model: TokenModel, parallel: SingleProcess) -> TokenModel | None:
    """The model in the first process, as an unsharded copy where it is sharded; None in the others, which take part."""
    if not parallel.sharded:
        return model if parallel.first else None
    device, state = next(model.parameters()).device, gathered_state(model, parallel)
    if not parallel.first:
        return None
    with torch.device("meta"):
        copy = model.config.build()
    copy.to_empty(device=device).load_state_dict(state)
    return copy


@contextmanager
def raise_on_all_ranks(parallel: SingleProcess) -> Iterator[None]:
    """What fails in one process fails in all of them, at the end of the block."""
    problem: Exception | None = None
    try:
        yield
    except (OSError, UserError) as failure:
        problem = failure
    # The first process with a problem says what it is, once for all.
    speaker = parallel.world - parallel.most(parallel.world - parallel.rank if problem else 0)
    if problem and speaker == parallel.rank:
        raise problem
    if speaker < parallel.world:
        raise RemoteRankError(f"process {speaker} of the run has failed")


def like(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, spread as ``other`` is."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)  # each cuts out its own


def processes() -> int:
    """How many processes torchrun (or Slurm) has started for this run; 0 if this is a plain one."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ) else 0


def local_device(device: torch.device) -> torch.device:
    """This process's own device of a kind: process i of a machine takes GPU i.

    Raises:
        UserError: a single GPU for several processes, more processes than GPUs, or a kind that cannot work together.
    """
    require(device.type in ("cpu", "cuda"), f"several processes cannot share the device '{device.type}'; allowed: cpu, cuda")
    if device.type == "cpu":
        return device
    require(device.index is None, f"device is '{device}' for {processes()} processes; allowed: cuda, each takes its own")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    require(index < count, f"process {index} of this machine has no GPU; allowed: --nproc-per-node 1 to {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def joined(kind: Kind, device: torch.device) -> Iterator[SingleProcess]:
    """Within the block this process belongs to the group that torchrun's environment variables describe, if they do.

    Args:
        device: this process's own.

    Raises:
        UserError: the port is taken, the others are not found, or one of them dies.
    """
    if not processes():
        require(kind == "ddp", "--parallel fsdp spreads weights over processes; start them: torchrun ... -m continuar train ...")
        yield SingleProcess()
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as problem:
        raise UserError(_unreachable(where, str(problem))) from problem
    try:
        yield DDP(device) if kind == "ddp" else FSDP(device)
    except RuntimeError as problem:
        if not _LOST.search(str(problem)):
            raise
        raise UserError(
            f"process {dist.get_rank()} lost another process of the run ({_reason(problem)}); look at the first error of the "
            "others; the same command with --resume continues from the last checkpoint"
        ) from problem
    finally:
        dist.destroy_process_group()


def _reason(problem: RuntimeError) -> str:
    """The line that says what happened, without where in which library it was noticed."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(problem).splitlines()[0]).split(". This is typically")[0]


def _unreachable(where: str, problem: str) -> str:
    if "EADDRINUSE" in problem or "address already in use" in problem.lower():
        return f"port {where} is taken; allowed: another one (torchrun --master-port N, or --standalone, which finds one)"
    return f"the processes of the run did not find one another at {where}: {problem.splitlines()[0]}"


T = TypeVar("T")
_PATIENCE = timedelta(days=7)
"""How long others may compute before waiting counts as a failure; one that dies ends the waiting at once."""


@dataclass(frozen=True)
class EvaluationProcesses:
    """Which of how many this one is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it speaks for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def share(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def evaluation_processes() -> Iterator[EvaluationProcesses]:
    """The evaluation_processes of this run, connected while the block lasts."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield EvaluationProcesses()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield EvaluationProcesses(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
