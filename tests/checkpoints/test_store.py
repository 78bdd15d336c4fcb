"""Saved models on disk: all of it or none, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from continuar.checkpoints.store import CONFIG, PipelineConfig, check_keys, load_state, read_pipeline_config
from continuar.errors import UserError
from continuar.heads import DiffusionHeadConfig
from continuar.io import write_json
from continuar.models import MAEConfig
from continuar.models.autoregressive import ModelConfig
from continuar.orders import MAROrderConfig
from continuar.sampling.options import SamplingOptions
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
