"""Official files that cannot be read: one clear line each, and nothing that a file holds is run."""

from __future__ import annotations

import collections
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continuar.checkpoints.mar import read_official
from continuar.errors import UserError

from .files import content, refused
from .layout import Sizes, args, state


class Forbidden:
    """A pickle of this would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


def write_bad(kind: str, path: Path) -> None:
    """A file that is no official checkpoint."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind == "safetensors":
        save_file(state(Sizes()), path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"model_ema": {}}))
    elif kind == "directory":
        path.mkdir()
    elif kind == "truncated":
        torch.save(content(), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind in ("forbidden", "unknown class", "list", "list args", "not tensors", "integers", "odd name", "empty dict"):
        values: dict[str, Any] = {
            "forbidden": content(scaler=Forbidden()),
            "unknown class": content(scaler=collections.deque([1])),
            "list": [1, 2],
            "list args": content(args=[1]),
            "not tensors": content(model_ema={"mask_token": 3}),
            "integers": content(model_ema={"mask_token": torch.ones(1, dtype=torch.int8)}),
            "odd name": content(model_ema={"mask\ntoken": torch.ones(1)}),
            "empty dict": {},
        }
        torch.save(values[kind], path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"<!DOCTYPE html>\n", "short": b"PK"}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("directory", "is not an official file, so DST must end in .pth"),
        ("empty", "is empty"),
        ("short", "is a file that begins with b'PK', not a checkpoint of torch.save; only plain tensors"),
        ("text", "is a file that begins with b'<!DOCTYPE html>', not a checkpoint of torch.save; only plain tensors"),
        ("zip", "is truncated, damaged or not a checkpoint of torch.save; only plain tensors"),
        ("truncated", "is truncated, damaged or not a checkpoint of torch.save; only plain tensors"),
        ("safetensors", "is a safetensors file, not a checkpoint of torch.save; only plain tensors"),
        ("plain pickle", "is a plain pickle, not a checkpoint of torch.save; only plain tensors"),
        ("forbidden", f"holds {os.name}.getcwd; only plain tensors"),
        ("unknown class", "holds collections.deque; only plain tensors"),
        ("list", "holds a list; a dict with 'model_ema' is expected"),
        ("list args", "is a list, not a Namespace"),
        ("not tensors", "'mask_token' is not a plain tensor of floating-point numbers"),
        ("integers", "'mask_token' is not a plain tensor of floating-point numbers"),
        ("odd name", r"'mask\ntoken' is not a plain tensor of floating-point numbers"),
        ("empty dict", "has no weights 'model_ema'; it holds: nothing"),
    ],
)
def test_convert_refuses_bad_files_in_one_line(tmp_path: Path, kind: str, message: str) -> None:
    source = tmp_path / "in" / "mar.pth"
    source.parent.mkdir()
    write_bad(kind, source)
    found = refused([str(source), str(tmp_path / "model")])
    assert message in found
    assert "mar.pth" in found
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_read_official_refuses_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory; an official checkpoint file"):
        read_official(tmp_path)


def complaint(path: Path) -> str:
    """What is wrong with a damaged file, or "" if the damage is inside numbers, where only a checksum would tell."""
    try:
        read_official(path)
    except UserError as problem:
        message = str(problem)
    else:
        return ""
    assert "\n" not in message
    assert "weights_only" not in message
    return message


def test_read_official_refuses_damaged_files_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    path, refusals = tmp_path / "mar.pth", 0
    for zipped in (True, False):
        torch.save({"model_ema": {"a": torch.ones(2)}, "args": args(Sizes())}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
            for _ in range(min(3, len(damaged))):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            path.write_bytes(damaged)
            refusals += complaint(path) != ""
    assert refusals > 200
