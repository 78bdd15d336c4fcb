"""Pieces that commands share: the progress display, options, and the device of a process."""

from dataclasses import dataclass

import pytest
import torch

from continuar.cli.common import at_least, local_device, parse, progress_bars, run_command
from continuar.errors import UserError


def test_progress_bars_appear_on_stderr_when_they_move(capsys: pytest.CaptureFixture) -> None:
    with progress_bars() as bar:
        bar("reading images")
    assert capsys.readouterr() == ("", "")
    with progress_bars() as bar:
        training = bar("training")
        training(1, 4, "loss 0.5")
        training(2, 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(text in err for text in ("training", "2/4", "loss 0.5"))


def test_progress_bars_of_other_processes_are_silent(capsys: pytest.CaptureFixture) -> None:
    with progress_bars(shown=False) as bar:
        bar("training")(1, 4)
    assert capsys.readouterr() == ("", "")


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    # A comment for readers of the code.
    size: int = 3
    """Help of size."""


def test_help_shows_docstrings_and_no_comments(capsys: pytest.CaptureFixture) -> None:
    def command(options: Options) -> None:
        """Does something."""

    with pytest.raises(SystemExit) as stop:
        run_command(command, "continuar command", ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "continuar command" in out
    assert "Does something." in out
    assert "Help of size. (default: 3)" in out
    assert "readers" not in out
    assert parse(Options, ["--size", "4"], prog="x", description="") == Options(4)


def test_at_least_names_the_option() -> None:
    at_least(1, batch_size=1, images=None)
    with pytest.raises(UserError, match="--batch-size is 0; allowed: 1 or more"):
        at_least(1, images=2, batch_size=0)


def test_local_device_is_the_own_gpu_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("auto") == torch.device("cuda", 1)
    assert local_device("cuda:0") == torch.device("cuda", 0)
    assert local_device("cpu") == torch.device("cpu")
