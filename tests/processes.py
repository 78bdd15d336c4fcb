"""Real processes for tests, forked from a server that has imported torch and this package once and computed nothing."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["continuar.cli.train", "torch.distributed.checkpoint", "torch.utils.tensorboard", "tests.tiny"])


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(function: Callable[..., Any], *arguments: Any, rank: int | None = None, world: int = 0, port: int = 0) -> BaseProcess:
    """Starts ``function`` in a process of its own, with torchrun's environment if it has a rank."""
    process = CONTEXT.Process(target=_child, args=(function, arguments, rank, world, port), daemon=True)
    process.start()
    return process


def group(world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[int | None]:
    """Runs ``function`` in ``world`` processes that find one another; returns their exit codes."""
    port = free_port()
    return finish([start(function, *arguments, rank=r, world=world, port=port) for r in range(world)], seconds)


def finish(started: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Exit codes; a process that is not done by then is killed and has the code of that."""
    end = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns when the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int | None, world: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if rank is not None:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(70)
    os._exit(code if isinstance(code, int) else 0)


def quiet(path: Path) -> None:
    """Sends this process's output, and that of what it runs, to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
