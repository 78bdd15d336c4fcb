"""Saved models on disk: all of it or none, and errors that name what is wrong."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from continuar.checkpoints.store import (
    CONFIG,
    WEIGHTS,
    PipelineConfig,
    atomic_directory,
    check_keys,
    checksum,
    load_state,
    read_json,
    read_pipeline_config,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from continuar.errors import UserError
from continuar.heads import DiffusionHeadConfig
from continuar.models import MAEConfig
from continuar.models.autoregressive import ModelConfig
from continuar.orders import MAROrderConfig
from continuar.sampling.generate import SamplingOptions
from continuar.tokenizers import LatentConfig, PixelConfig, TokenizerConfig


def model_file(tokenizer: TokenizerConfig, classes: tuple[str, ...] = ("cat", "dög")) -> PipelineConfig:
    config = ModelConfig(
        tokenizer.spec,
        len(classes),
        MAROrderConfig(),
        MAEConfig(
            width=8, encoder_depth=1, heads=2, decoder_width=4, decoder_depth=1, decoder_heads=1, buffer=2, mask_ratio_min=0.5
        ),
        DiffusionHeadConfig(width=8, depth=1, diffusion_batch_mul=2),
    )
    return PipelineConfig(config, tokenizer, classes, SamplingOptions(steps=3, guidance_scale=2.5, temperature=0.9))


FILES = [model_file(LatentConfig(image_size=64, scale=0.1)), model_file(PixelConfig(image_size=8, patch=2, std=0.5), ())]


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


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


def test_atomic_directory_replaces_an_existing_one_whole(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("file", FILES, ids=["latent", "pixel"])
def test_model_file_survives_json(tmp_path: Path, file: PipelineConfig) -> None:
    write_json(tmp_path / CONFIG, file)
    assert read_pipeline_config(tmp_path) == file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 of a saved model; this version reads 1"),
        ({"classes": ["cat"]}, "1 class names for 2 classes"),
        ({"colour": 1}, "unknown field of .*'colour'"),
        ({"tokenizer": {"kind": "latent", "image_size": 32}}, "the tokenizer gives .* the model takes"),
        ({"tokenizer": {"kind": "wavelet"}}, "unknown kind of .*tokenizer 'wavelet'.*pixel"),
        ({"classes": [1, 2]}, r"classes\[0\] is 1; str is expected"),
    ],
)
def test_read_model_file_refuses_what_does_not_fit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_json(tmp_path / CONFIG, FILES[0])
    value = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    write_json(tmp_path / CONFIG, value | change)
    with pytest.raises(UserError, match=message):
        read_pipeline_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is not a saved model: it has no config.json"), ("{", "is not valid JSON"), ("[]", "is not the config of")],
)
def test_read_model_file_refuses_other_directories(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        read_pipeline_config(tmp_path)


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
    write_tensors(tmp_path / WEIGHTS, tensors)
    found = read_tensors(tmp_path / WEIGHTS)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def test_write_tensors_converts_floating_ones_only(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, {"w": torch.tensor([1 / 3]), "n": torch.tensor(7)}, torch.bfloat16)
    found = read_tensors(tmp_path / WEIGHTS)
    assert (found["w"].dtype, found["n"].dtype) == (torch.bfloat16, torch.int64)
    assert found["w"].item() == torch.tensor(1 / 3).to(torch.bfloat16).item()


def test_read_tensors_refuses_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.ones(2, 2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{WEIGHTS} is truncated or not a safetensors file"):
            read_tensors(path)


def test_read_tensors_refuses_other_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_tensors(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="absent does not exist"):
        read_tensors(tmp_path / "absent")


def test_check_keys_names_everything() -> None:
    expected = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([1, 4])}
    check_keys({k: torch.zeros(v) for k, v in expected.items()}, expected, "here")
    with pytest.raises(UserError) as problem:
        check_keys({"x": torch.zeros(1), "b": torch.zeros(3), "c": torch.zeros(4, 1)}, expected, "here")
    assert str(problem.value) == (
        "here does not fit the model: missing: a; unexpected: x; of another shape: c (4, 1) instead of (1, 4)"
    )


def test_check_keys_shortens_long_lists_but_counts_them() -> None:
    expected = {f"k{i}": torch.Size([1]) for i in range(5)}
    with pytest.raises(UserError, match=r"missing: k0, k1, \.\.\. \(5 in all\)$"):
        check_keys({}, expected, "here", shown=2)


def test_load_state_loads_all_or_refuses() -> None:
    module = nn.Linear(2, 1)
    load_state(module, {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([5.0])}, "w")
    assert module(torch.ones(1, 2)).item() == 12.0
    with pytest.raises(UserError, match="w does not fit the model: missing: bias"):
        load_state(module, {"weight": torch.zeros(1, 2)}, "w")
    assert module.weight.tolist() == [[3.0, 4.0]]


def test_checksum_is_crc32(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"123456789")
    assert checksum(path) == "cbf43926"  # the check value of CRC-32
    large = bytes(range(256)) * (1 << 15)
    path.write_bytes(large)
    assert checksum(path) == f"{zlib.crc32(large):08x}"
