"""Signals that end a run: noted when they come, obeyed between two steps, so that a step is never torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType


class Stop(IntEnum):
    """Why a run should end now; where processes differ, the largest holds."""

    NO = 0
    ASKED = 1  # SIGTERM, or the caller: save and end well
    INTERRUPTED = 2  # Ctrl-C: save and say so


class Signals:
    """What has come so far."""

    def __init__(self) -> None:
        self.stop = Stop.NO

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C interrupts at once."""
        if number == signal.SIGINT and self.stop is Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self.stop = max(self.stop, Stop.INTERRUPTED if number == signal.SIGINT else Stop.ASKED)


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Within the block Ctrl-C and SIGTERM are only noted; outside the main thread, which alone gets signals, none come."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
