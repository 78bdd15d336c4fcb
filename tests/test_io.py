"""Files on disk: all of it or none, whenever the writer is killed, and errors that name what is wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from continuar.errors import UserError
from continuar.io import (
    atomic_directory,
    atomic_file,
    checksum,
    read_json,
    read_tensors,
    temporary_path,
    write_json,
    write_tensors,
    write_text,
)


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def write_directory(destination: Path, text: str) -> None:
    with atomic_directory(destination) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text)


def write_bytes(destination: Path, text: str) -> None:
    with atomic_file(destination) as file:
        for part in text:
            file.write(part.encode())


def killed_at_step(number: int, write: Callable[[Path, str], None], destination: Path) -> None:
    """Runs in a process of its own: kills itself just before its ``number``-th operation on files."""
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in ("open", "ctypes.dlsym/handle") or event.startswith(("os.", "shutil.", "ctypes.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write(destination, "new")
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("write", [write_text, write_bytes, write_directory])
def test_a_writer_killed_between_two_steps_leaves_the_old_or_the_new(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    def content(path: Path) -> list[str]:
        return [p.read_text() for p in sorted(path.iterdir())] if path.is_dir() else [path.read_text()]

    destination, number, seen = tmp_path / "it", 0, set()
    while number < 200:
        number += 1
        write(destination, "old")
        process = multiprocessing.get_context("fork").Process(target=killed_at_step, args=(number, write, destination))
        process.start()
        process.join()
        found = content(destination)
        assert found in (["old"] * len(found), ["new"] * len(found))
        assert len(found) == (2 if write is write_directory else 1)
        seen.add(found[0])
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert number > 3
    assert found[0] == "new"
    assert seen == {"old", "new"}


def test_temporary_names_differ_between_processes_that_share_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = temporary_path(tmp_path / "a")
    monkeypatch.setattr("continuar.io._TOKEN", "another")  # a process of the same id on another host
    assert temporary_path(tmp_path / "a") != ours
    assert temporary_path(tmp_path / "a", "shared") == tmp_path / ".a.shared.tmp"


def fill_and_fail(destination: Path, kind: type[BaseException]) -> None:
    with atomic_directory(destination) as temporary:
        (temporary / "a").write_text("new")
        raise kind


@pytest.mark.parametrize("kind", [RuntimeError, Interrupted])
def test_atomic_directory_leaves_nothing_when_filling_fails(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        fill_and_fail(tmp_path / "model", kind)
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_keeps_the_old_one_when_filling_fails(tmp_path: Path) -> None:
    old = tmp_path / "model"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(RuntimeError):
        fill_and_fail(old, RuntimeError)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (old / "a").read_text() == "old"


@pytest.mark.parametrize("platform", ["linux", "other"])
def test_atomic_directory_replaces_an_existing_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr("continuar.io.sys.platform", platform)
    destination = tmp_path / "deep" / "model"
    for name in ("a", "b"):
        with atomic_directory(destination) as temporary:
            (temporary / name).write_text(name)
            assert not (destination / name).exists()
    assert [p.name for p in destination.iterdir()] == ["b"]
    assert [p.name for p in destination.parent.iterdir()] == ["model"]


def test_write_text_replaces_at_once_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_json_survives_a_file_as_it_is(tmp_path: Path) -> None:
    # These are names of old configs; here they are data, and stay.
    value = {"guidance": 1, "prediction": "eps", "list": [{"recompute": True}]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())


def test_read_json_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")


def test_tensors_survive_a_file(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.tensor([[1.5, -2.0], [float("nan"), 4.0]]),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "half": torch.tensor([1.0, 2.0], dtype=torch.float16),
        "count": torch.tensor(7),
    }
    write_tensors(tmp_path / "w", tensors)
    found = read_tensors(tmp_path / "w")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def test_write_tensors_converts_floating_ones_only(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w", {"w": torch.tensor([1 / 3]), "n": torch.tensor(7)}, torch.bfloat16)
    found = read_tensors(tmp_path / "w")
    assert (found["w"].dtype, found["n"].dtype) == (torch.bfloat16, torch.int64)
    assert found["w"].item() == torch.tensor(1 / 3).to(torch.bfloat16).item()


def test_read_tensors_refuses_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.ones(2, 2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="w is truncated or not a safetensors file"):
            read_tensors(path)


def test_read_tensors_refuses_other_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_tensors(tmp_path / "w")
    with pytest.raises(UserError, match="absent does not exist"):
        read_tensors(tmp_path / "absent")


def test_checksum_is_crc32(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"123456789")
    assert checksum(path) == "cbf43926"  # the check value of CRC-32
    large = bytes(range(256)) * (1 << 15)
    path.write_bytes(large)
    assert checksum(path) == f"{zlib.crc32(large):08x}"
