"""Devices and processes: where a process computes, and how several of them train one model or share an evaluation.

Several processes (started by torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) train what one would:

1. A global batch of B images is B/m micro-batches of m. Process r of W takes the r-th W-th part of them, one after another.
2. The random numbers of a micro-batch are a function of (seed, step, its number in the global batch), and all micro-batches of a
   step mask the same number of tokens. Loss and gradient are therefore plain means over micro-batches and do not depend on W.
3. Gradients are averaged over processes. `DDP` keeps all weights in every process (DistributedDataParallel); `FSDP` keeps a W-th
   part of weights, gradients, moments and averages in each (FSDP2). `SingleProcess` is one process, where all of this is free.
4. Decisions (skip a step, stop, roll back) depend only on numbers that every process has.
5. A process that hangs must not hold the others for long: collectives fail after `timeout` seconds. Work that may take longer in
   one process than in others (reading data, writing a checkpoint, drawing samples) ends with `SingleProcess.wait`, which has no
   time limit but watches the others' heartbeats.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from continuar.errors import RemoteRankError, UserError, require

T = TypeVar("T")
Kind = Literal["ddp", "fsdp"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
GIB = 2**30
"""Bytes of a GiB, the unit of memory in configs and messages."""
CPU = torch.device("cpu")


# --- devices ---


def expandable_segments() -> None:
    """Lets torch's CUDA allocator grow its segments, unless the user's environment configures it.

    Call it before the first CUDA tensor. CUDA graphs of several masked counts that share a memory pool then hold an eighth to a
    fifth less (docs/scaling.md).
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device a name means: cpu, cuda, cuda:N or mps; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        UserError: the name is no device, or this machine does not have it.
    """
    if isinstance(name, torch.device):
        return name
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    allowed = f"device is '{name}'; allowed: auto, cpu, cuda, cuda:N, mps"
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UserError(allowed) from problem
    require(device.type in available, allowed)
    require(available[device.type], f"device is '{name}', which this machine does not have; try 'auto'")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        require(device.index < count, f"device is '{name}'; this machine has {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return device


def processes() -> int:
    """The number of processes that torchrun (or Slurm) has started for this run; 0 if this process was started by itself."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ) else 0


def local_device(device: torch.device) -> torch.device:
    """This process's own device of a kind: process i of a machine takes GPU i.

    Raises:
        UserError: a single GPU for several processes, more processes than GPUs, or a kind without collectives.
    """
    require(device.type in ("cpu", "cuda"), f"several processes cannot share the device '{device.type}'; allowed: cpu, cuda")
    if device.type == "cpu":
        return device
    require(device.index is None, f"device is '{device}' for {processes()} processes; allowed: cuda, each takes its own")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    require(index < count, f"process {index} of this machine has no GPU; allowed: --nproc-per-node 1 to {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


# --- processes ---


@runtime_checkable
class Shardable(Protocol):
    """A module that names its parts to `FSDP`, as `TokenModel` does."""

    def shard_units(self) -> Iterator[tuple[list[nn.Module], bool]]:
        """(modules, low) for each group of modules whose weights are gathered together while they are used.

        ``low``: under bfloat16 autocast the weights may travel in bfloat16, because all of them are rounded to it anyway.
        """
        ...


class SingleProcess:
    """One process; also the interface of several.

    Attributes:
        rank, world: number of this process, and number of processes.
        sharded: whether weights are spread over the processes.
    """

    rank, world, sharded = 0, 1, False

    @property
    def first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def slots(self, micro_batches: int) -> range:
        """This process's micro-batches of a step.

        Raises:
            UserError: the processes cannot share them evenly.
        """
        allowed = f"allowed: a number of processes that divides {micro_batches}, or another train.micro_batch"
        return self._part(micro_batches, f"{self.world} processes for {micro_batches} micro-batches per step; {allowed}")

    def part(self, batch_size: int) -> range:
        """This process's images of a batch.

        Raises:
            UserError: the processes cannot share them evenly.
        """
        allowed = "allowed: a number of processes that divides it"
        return self._part(batch_size, f"{self.world} processes for a batch of {batch_size}; {allowed}")

    def _part(self, count: int, message: str) -> range:
        require(count % self.world == 0, message)
        each = count // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def wrap(self, objective: nn.Module, bf16: bool) -> nn.Module:
        """The module whose backward averages gradients over the processes; it may replace the objective's parameters.

        Args:
            bf16: the objective runs under bfloat16 autocast.
        """
        return objective

    def shard(self, model: nn.Module) -> None:
        """Spreads the weights of a model that never runs (an average), as `wrap` spreads those of the model that trains."""

    def syncing(self, objective: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Context of one micro-batch's forward and backward: gradients are averaged over processes only in the ``last`` one."""
        return nullcontext()

    def mean(self, x: Tensor) -> Tensor:
        """The mean of all processes' x, on the device."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, on the device."""
        return x

    def average(self, x: Tensor) -> None:
        """Overwrites x by the mean of all processes' x, on the device."""

    def average_all(self, tensors: list[Tensor]) -> None:
        """Overwrites tensors of one dtype by their means over processes, in one collective."""

    def share(self, tensors: list[Tensor]) -> None:
        """Overwrites tensors by the first process's."""

    def share_object(self, value: T) -> T:
        """The first process's value, in every process; waits as `wait` does."""
        return value

    def most(self, value: int, patient: bool = False) -> int:
        """The largest of all processes' values, on the host: a point that all processes reach together.

        Args:
            patient: other processes may work for any time before they come here, as long as they live.
        """
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.most(int(flag)))

    def wait(self) -> None:
        """Returns when every process has come here, however long that takes; ends with an error if one of them is gone."""
        self.most(0, patient=True)


class LostRankError(RuntimeError):
    """Another process of the run died, was stopped or hangs. `joined` turns it into a UserError."""


class DDP(SingleProcess):
    """Processes that all have all weights. Made by `joined`, which has initialised torch.distributed."""

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.heartbeat = heartbeat
        # Hosts meet in a gloo group of their own, so that no process waits for its device.
        self._hosts: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout()))

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

    def share_object(self, value: T) -> T:
        self.wait()
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._hosts)
        return values[0]

    def most(self, value: int, patient: bool = False) -> int:
        if patient:
            # Through the store, because a pending collective could not be given up when another process is gone.
            self.heartbeat.wait_for_all(timeout())
        x = torch.tensor(value)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self._hosts)
        self.heartbeat.met = time.monotonic()
        return int(x)


class FSDP(DDP):
    """Processes that each have a part of the weights. Made by `joined`.

    A transformer block's matrices are gathered when the block runs, in bfloat16 where autocast rounds them to it. The head is
    gathered in float32, in which its time embedding and output layer compute. All other weights are gathered once per pass.
    """

    sharded = True

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        # FSDP and DTensor take a second to import, which runs of one process need not pay.
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(device, heartbeat)
        self._mesh = init_device_mesh(device.type, (self.world,))
        # torch warns that a returned view must not be changed in place. No module of this package does that.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    def wrap(self, objective: nn.Module, bf16: bool) -> nn.Module:
        self._spread(objective, torch.bfloat16 if bf16 else None)
        return objective

    def shard(self, model: nn.Module) -> None:
        self._spread(model, None)

    def _spread(self, root: nn.Module, low: torch.dtype | None) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        full = MixedPrecisionPolicy()
        rounded = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for model in [m for m in root.modules() if isinstance(m, Shardable)]:
            for modules, may_be_low in model.shard_units():
                fully_shard(modules, mesh=self._mesh, mp_policy=rounded if may_be_low else full)
        fully_shard(root, mesh=self._mesh)


# --- sharded tensors and models ---


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # pyright: ignore


def gathered(x: Tensor) -> Tensor:
    """All of a sharded tensor, gathered by all processes together; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyright: ignore[reportAttributeAccessIssue]


def like(x: Tensor, other: Tensor) -> Tensor:
    """A full tensor that every process has, spread as ``other`` is: each process cuts out its own part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def gathered_state(model: nn.Module, parallel: SingleProcess) -> dict[str, Tensor]:
    """A model's full state dict in the first process, on the CPU if it was sharded; empty in the others, which take part."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = gathered(tensor)
        if parallel.first:
            state[name] = full.cpu() if parallel.sharded else full
    return state


def gathered_model(model: Any, parallel: SingleProcess) -> Any:
    """The `TokenModel` in the first process, as an unsharded copy if it is sharded; None in the others, which take part."""
    if not parallel.sharded:
        return model if parallel.first else None
    device, state = next(model.parameters()).device, gathered_state(model, parallel)
    if not parallel.first:
        return None
    with torch.device("meta"):
        copy = model.config.build()
    copy.to_empty(device=device).load_state_dict(state)
    return copy


# --- joining, and failing together ---


@contextmanager
def raise_on_all_ranks(parallel: SingleProcess) -> Iterator[None]:
    """Makes an OSError or UserError of one process an error of all, at the end of the block; waits for processes that take longer.

    Raises:
        RemoteRankError: in every process but the first one with a problem, which raises that problem.
    """
    problem: Exception | None = None
    try:
        yield
    except (OSError, UserError) as failure:
        problem = failure
    speaker = parallel.world - parallel.most(parallel.world - parallel.rank if problem else 0, patient=True)
    if problem and speaker == parallel.rank:
        raise problem
    if speaker < parallel.world:
        raise RemoteRankError(f"process {speaker} of the run has failed")


TIMEOUT_VARIABLE = "CONTINUAR_TIMEOUT"


def timeout() -> float:
    """Seconds after which a collective fails; the environment variable CONTINUAR_TIMEOUT, or 600.

    Raises:
        UserError: the variable is no number above 0.
    """
    # Ten minutes cover what processes do at different speeds within a step: compiling, capturing, a file system that stalls.
    value = os.environ.get(TIMEOUT_VARIABLE, "600")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    require(0 < seconds < 1e9, f"{TIMEOUT_VARIABLE} is '{value}'; allowed: seconds, above 0")
    return seconds


BEAT = 1.0
"""Seconds between two heartbeats."""


class Heartbeat:
    """Shows the other processes that this one lives, and knows which of them do.

    A thread counts beats into the run's store once a second. It beats on while the main thread computes or waits, and stops when
    the process dies or is stopped.

    Attributes:
        met: when this process last met all others (`time.monotonic`).
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        # A clone has a connection of its own, so that a collective that waits in the store does not hold up the beats.
        self._store, self._rank, self._world = store.clone(), rank, world
        self.met = time.monotonic()
        self._waits = 0
        self._ended = threading.Event()
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def _run(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
            except dist.DistError:
                return  # the store is gone, and with it the run

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join(timeout=BEAT)

    def wait_for_all(self, limit: float) -> None:
        """Returns when all processes have called this equally often.

        Raises:
            LostRankError: one of them has not beaten for ``limit`` seconds, or for 60.
        """
        self._waits += 1
        key, limit = f"waits/{self._waits}", min(limit, 60.0)
        arrived = self._ask(lambda: self._store.add(key, 1), limit)
        began = looked = time.monotonic()
        beats, seen = [""] * self._world, [began] * self._world
        while arrived is not None and arrived < self._world:
            # Often at first, because most waits are short; each question is a round trip to the store.
            time.sleep(0.002 if time.monotonic() - began < 1 else 0.05)
            arrived = self._ask(lambda: self._store.add(key, 0), limit)
            if (now := time.monotonic()) - looked > BEAT:
                looked, found = now, self._read(limit)
                for rank, beat in enumerate(found or []):
                    if beat != beats[rank]:
                        beats[rank], seen[rank] = beat, now
                if silent := [rank for rank in range(self._world) if rank != self._rank and now - seen[rank] > limit]:
                    raise LostRankError(_silent(silent))
        if arrived is None:
            raise LostRankError(_NO_STORE)

    def missing(self) -> str:
        """Names the processes that keep this one waiting, after a collective has failed here; empty if all of them live and wait.

        Every process in which the collective failed says so in the store. The ones that hang, or are gone, do not.
        """
        before = self._read()
        if before is not None:
            self._store.set(f"failed/{self._rank}", "1")
        time.sleep(3 * BEAT)
        after = self._read()
        if before is None or after is None:
            return _NO_STORE
        others = [rank for rank in range(self._world) if rank != self._rank]
        if silent := [rank for rank in others if before[rank] == after[rank]]:
            return _silent(silent)
        limit = timeout()
        if time.monotonic() - self.met > limit:
            hung = [rank for rank in others if not self._store.check([f"failed/{rank}"])]
            return f"{_names(hung)} hung: alive, but no answer for {limit:g} s" if hung else f"no answer for {limit:g} s"
        return ""

    def _read(self, limit: float = 10.0) -> list[str] | None:
        """The beats of all processes; None if the store does not answer."""
        keys = [f"beat/{rank}" for rank in range(self._world)]
        found = self._ask(lambda: self._store.multi_get(keys), limit)
        return None if found is None else [beat.decode() for beat in found]

    def _ask(self, question: Callable[[], T], limit: float) -> T | None:
        """The store's answer; None if there is none within ``limit`` seconds."""
        answer: queue.Queue[T | None] = queue.Queue(1)

        def ask() -> None:
            try:
                answer.put(question())
            except dist.DistError:
                answer.put(None)

        # In a thread, because a request to a server that is stopped never returns.
        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.get(timeout=limit)
        except queue.Empty:
            return None


_NO_STORE = "process 0, or the torchrun that holds the run's store, does not answer"


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process{'es' if len(ranks) > 1 else ''} {shown}"


def _silent(ranks: list[int]) -> str:
    return f"{_names(ranks)} died, was stopped, or lost its machine"


@contextmanager
def joined(kind: Kind = "ddp", device: torch.device = CPU) -> Iterator[SingleProcess]:
    """Within the block this process belongs to the group that torchrun's environment variables describe, if they do.

    Args:
        device: this process's own, whose tensors travel; the CPU where processes share work only through files.

    Raises:
        UserError: the port is taken, the others are not found, or one of them dies or hangs.
    """
    if not processes():
        require(kind == "ddp", "--parallel fsdp spreads weights over processes; start them: torchrun ... -m continuar train ...")
        yield SingleProcess()
        return
    limit, where = timeout(), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    # NCCL ends the process when its own limit is over. Twice the limit lets the hosts, which meet at every step, notice first.
    patience = timedelta(seconds=limit if device.type == "cpu" else 2 * limit)
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=limit)))
        heartbeat = Heartbeat(store, rank, world)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except (dist.DistError, ValueError) as problem:
        if _port_taken():
            raise UserError(
                f"port {where} is taken; allowed: another one (torchrun --master-port N, or --standalone, which finds one)"
            ) from problem
        reason = str(problem).splitlines()[0]
        raise UserError(f"the processes of the run did not find one another at {where}: {reason}") from problem
    try:
        yield DDP(device, heartbeat) if kind == "ddp" else FSDP(device, heartbeat)
    except RuntimeError as problem:
        # gloo raises plain RuntimeErrors. The heartbeats, not the message, tell a lost process from a bug in this one.
        lost = str(problem) if isinstance(problem, LostRankError) else heartbeat.missing()
        if not lost and isinstance(problem, dist.DistError):
            lost = str(problem).splitlines()[0]
        if not lost:
            raise
        raise UserError(
            f"process {rank} lost another process of the run: {lost}; look at the first error of that process and end those that "
            f"are left; the same command with --resume continues from the last checkpoint ({TIMEOUT_VARIABLE}=SECONDS waits longer)"
        ) from problem
    finally:
        heartbeat.stop()
        dist.destroy_process_group()


def _port_taken() -> bool:
    """Whether the first process cannot listen where the others would look for it."""
    if os.environ["RANK"] != "0" or not os.environ["MASTER_PORT"].isdecimal():
        return False
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(os.environ["MASTER_PORT"])))
        except OSError as problem:
            return problem.errno == errno.EADDRINUSE
    return False
