"""Progress bars on standard error; each appears when there is progress to show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Bar = Callable[[int, int], None]
"""To be called with (done, total)."""


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[Callable[[str], Bar]]:
    """Yields what makes a bar of a name."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(file=sys.stderr), disable=not shown)
    tasks: dict[str, TaskID] = {}

    def bar(name: str) -> Bar:
        def update(done: int, total: int) -> None:
            if not tasks:
                progress.start()
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        return update

    try:
        yield bar
    finally:
        if tasks:
            progress.stop()
