"""Child processes that are watched: each has an end, may have to show progress, and dies with its parent.

A compiler that hangs or a driver that fails takes only the child with it; what is kept is the parent's business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Reason = Literal["finished", "failed", "out of time", "too slow"]
_DIES_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Becomes the command in its arguments, and is killed (9) when its parent dies: PR_SET_PDEATHSIG is 1, and outlasts execv."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: why, after how many seconds, and the last lines it wrote."""

    reason: Reason
    seconds: float
    tail: tuple[str, ...]

    @property
    def last_line(self) -> str:
        """The last line it wrote, or nothing."""
        return self.tail[-1] if self.tail else ""


def watch(
    command: Sequence[str],
    log: Path,
    *,
    end: float,
    on_tick: Callable[[], None] = lambda: None,
    progress: Callable[[], int] | None = None,
    patience: float = float("inf"),
    warm_at: int = 1,
    poll_seconds: float = 0.5,
) -> Ended:
    """Runs a command until it ends, or until it has to be ended.

    Args:
        log: the file its output goes to.
        end: when it is killed at the latest, in seconds since the epoch.
        on_tick: called twice a second, and once after the end.
        progress: a count that should grow.
        patience: seconds it may take to reach ``warm_at``, and afterwards to grow at all.
    """
    began = changed = time.time()
    seen = 0
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            dying_with_parent(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
    reason: Reason = "failed"
    try:
        while process.poll() is None:
            on_tick()
            now = time.time()
            count = progress() if progress is not None else 0
            if count != seen:
                seen, changed = count, now
            if now >= end:
                reason = "out of time"
                break
            if progress is not None and now - (changed if seen >= warm_at else began) > patience:
                reason = "too slow"
                break
            time.sleep(poll_seconds)
        else:
            reason = "failed" if process.returncode else "finished"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the child, and compilers it may have left behind
        process.wait()
    on_tick()
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Ended(reason, time.time() - began, tuple(lines[-12:]))


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """A child whose parent was killed must not write into a folder that the next slice works in. Elsewhere than on Linux it may."""
    return [sys.executable, "-c", _DIES_WITH_PARENT, *command] if sys.platform == "linux" else list(command)
