"""Watched child processes: every way they can end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shipping.children import watch

FOREVER = "import time\nwhile True: time.sleep(0.01)"


def child(script: str, tmp_path: Path, end: float = 60.0, **options):
    return watch([sys.executable, "-c", script], tmp_path / "log", end=time.time() + end, poll_seconds=0.01, **options)


def test_a_child_that_ends_says_how(tmp_path: Path) -> None:
    good = child("print('one\\n\\ntwo')", tmp_path)
    assert (good.reason, good.tail, good.last_line) == ("finished", ("one", "two"), "two")
    bad = child("raise SystemExit('no')", tmp_path)
    assert (bad.reason, bad.last_line) == ("failed", "no")


def test_a_child_is_ended_when_its_time_is_over_and_what_it_started_too(tmp_path: Path) -> None:
    script = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {FOREVER!r}]).pid, flush=True)\n{FOREVER}"
    ended = child(script, tmp_path, end=1.0)
    assert ended.reason == "out of time"
    assert gone(int(ended.last_line))


def test_a_child_without_progress_is_given_up_before_and_after_its_start(tmp_path: Path) -> None:
    assert child(FOREVER, tmp_path, progress=lambda: 1, warm_at=2, patience=0.1).reason == "too slow"
    counts = iter([0, 1, 2, *[3] * 10**6])
    assert child(FOREVER, tmp_path, progress=lambda: next(counts), warm_at=2, patience=0.1).reason == "too slow"
    assert next(counts) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child whose parent was killed")
def test_a_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"import os, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()) + ' ')\n{FOREVER}"
    watcher = (
        "import sys, time, pathlib; from shipping.children import watch\n"
        f"watch([sys.executable, '-c', {script!r}], pathlib.Path({str(tmp_path / 'log')!r}), end=time.time() + 60)"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    parent = subprocess.Popen([sys.executable, "-c", watcher], env={**os.environ, "PYTHONPATH": path})
    while not (pid_file.exists() and pid_file.read_text().endswith(" ")):
        assert parent.poll() is None
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(int(pid_file.read_text()))


def gone(pid: int) -> bool:
    """Whether a killed process vanishes; a zombie that nobody waits for counts as gone."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False
