"""Saved tokenizers: what is kept, what may be changed, and what a cache of latents belongs to."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from continuar.checkpoints.store import TOKENIZER, PipelineConfig
from continuar.checkpoints.tokenizers import (
    TOKENIZER_CONFIG,
    Changes,
    for_model,
    load_tokenizer,
    save_tokenizer,
    set_scale,
)
from continuar.errors import UserError
from continuar.io import write_tensors
from continuar.pipeline import Pipeline, load
from continuar.tokenizers import (
    CodebookConfig,
    CodebookTokenizer,
    LatentConfig,
    PixelConfig,
    Tokenizer,
    TokenizerConfig,
    VAEConfig,
    VQConfig,
    fingerprint,
)
from tests.tiny import model_configs, options_of
from tests.tiny import shaken as shaken_model
from tests.tokenizers.networks import CONSISTENCY, KL, TINY, VQ, images, shaken

CONFIGS = [VAEConfig(network=n, image_size=8, scale=0.5, shift=0.1) for n in (KL, VQ, TINY, CONSISTENCY)]
CONFIGS += [VQConfig(network=VQ, image_size=8), PixelConfig(image_size=8, std=0.5)]
CONFIGS += [CodebookConfig(image_size=8, patch=2, vocabulary=11)]


def saved(path: Path, config: TokenizerConfig = CONFIGS[0]) -> Tokenizer:
    tokenizer = shaken(config.build())
    if isinstance(tokenizer, CodebookTokenizer):
        tokenizer.codebook.copy_(torch.rand(tokenizer.codebook.shape, generator=torch.Generator().manual_seed(0)))
    save_tokenizer(config, tokenizer.state_dict(), path)
    return tokenizer


@pytest.mark.parametrize("config", CONFIGS)
def test_saving_and_loading_gives_the_same_latents_bit_for_bit(config: TokenizerConfig, tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", config)
    again = load_tokenizer(tmp_path / "t")
    assert again.config == config
    assert torch.equal(again.encode(images()), tokenizer.encode(images()))
    assert fingerprint(again) == fingerprint(tokenizer)
    state = {TOKENIZER} if tokenizer.state_dict() else set()
    assert {p.name for p in (tmp_path / "t").iterdir()} == {TOKENIZER_CONFIG} | state


def test_image_size_patch_scale_and_ids_may_be_changed(tmp_path: Path) -> None:
    saved(tmp_path / "t", VAEConfig(network=VQ, image_size=8))
    config = load_tokenizer(tmp_path / "t", Changes(image_size=16, patch=2, scale=3.0)).config
    assert (config.image_size, config.patch, config.scale) == (16, 2, 3.0)
    ids = load_tokenizer(tmp_path / "t", Changes(ids=True))
    assert ids.spec.vocabulary == 11
    save_tokenizer(ids.config, ids.state_dict(), tmp_path / "ids")
    assert load_tokenizer(tmp_path / "ids", Changes(ids=False)).spec.dim == 2


def test_a_training_run_and_a_saved_model_hold_a_tokenizer(tmp_path: Path) -> None:
    for step in (5, 10):
        saved(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", replace(CONFIGS[0], scale=float(step)))
    assert load_tokenizer(tmp_path / "run").config.scale == 10
    saved(tmp_path / "run" / "tokenizer")
    assert load_tokenizer(tmp_path / "run").config.scale == 0.5
    pipe = pipeline(CONFIGS[0])
    pipe.save_pretrained(tmp_path / "model")
    assert fingerprint(load_tokenizer(tmp_path / "model")) == fingerprint(pipe.tokenizer)


@pytest.mark.parametrize("config", CONFIGS[:5])
def test_a_model_is_saved_with_its_autoencoder(config: TokenizerConfig, tmp_path: Path) -> None:
    pipe = pipeline(config)
    again = load(pipe.save_pretrained(tmp_path / "model"), device="cpu")
    assert again.config == pipe.config
    images = pipe([0, 1], [3, 4])
    assert images.shape == (2, 8, 8, 3)
    assert np.array_equal(images, again([0, 1], [3, 4]))
    write_tensors(tmp_path / "model" / TOKENIZER, {"network.x": torch.ones(1)})
    with pytest.raises(UserError, match="does not fit the model: missing: network"):
        load(tmp_path / "model", device="cpu")


def pipeline(config: TokenizerConfig) -> Pipeline:
    """A model on a tokenizer's tokens."""
    kind = config.spec.kind
    model = next(c for c in model_configs() if c.tokens.kind == kind)
    model = replace(model, tokens=config.spec)
    file = PipelineConfig(model, config, ("a", "b", "c"), options_of(model))
    return Pipeline(file, shaken_model(model), shaken(config.build()))


def test_set_scale_keeps_it_with_the_tokenizer(tmp_path: Path) -> None:
    before = saved(tmp_path / "t", replace(CONFIGS[0], scale=0.0))
    set_scale(tmp_path / "t", 0.2, -1.0)
    after = load_tokenizer(tmp_path / "t")
    assert (after.config.scale, after.config.shift) == (0.2, -1.0)
    assert fingerprint(after) == fingerprint(before)
    saved(tmp_path / "ids", VQConfig(network=VQ, image_size=8))
    with pytest.raises(UserError, match="is a tokenizer of kind 'vq', which has no scale"):
        set_scale(tmp_path / "ids", 1.0, 0.0)


def test_the_fingerprint_tells_encoders_apart_and_ignores_decoders() -> None:
    first = shaken(CONFIGS[0].build())
    other = shaken(CONFIGS[0].build())
    assert fingerprint(first) == fingerprint(other)
    with torch.no_grad():
        other.network.decoder.conv_in.weight.add_(1)
        other.network.post_quant_conv.bias.add_(1)
    assert fingerprint(first) == fingerprint(other)
    with torch.no_grad():
        other.network.quant_conv.bias[0] += 1e-6
    assert fingerprint(first) != fingerprint(other)


def test_ids_depend_on_the_codebook_and_vectors_do_not() -> None:
    vectors, ids = VAEConfig(network=VQ, image_size=8).build(), VQConfig(network=VQ, image_size=8).build()
    ids.load_state_dict(vectors.state_dict())
    before = fingerprint(vectors), fingerprint(ids)
    assert before[0] != before[1]
    with torch.no_grad():
        for tokenizer in (vectors, ids):
            tokenizer.network.quantize.embedding.weight.add_(1)
    assert fingerprint(vectors) == before[0]
    assert fingerprint(ids) != before[1]


def test_for_model_takes_sizes_and_scale_of_the_model(tmp_path: Path) -> None:
    saved(tmp_path / "t", replace(CONFIGS[0], scale=9.0))
    latent = LatentConfig(image_size=16, stride=2, channels=3, patch=2, scale=0.7)
    tokenizer = for_model(latent, tmp_path / "t")
    assert (tokenizer.config.scale, tokenizer.spec) == (0.7, latent.spec)
    with pytest.raises(UserError, match=r"gives TokenSpec.*; the model takes TokenSpec"):
        for_model(replace(latent, channels=4), tmp_path / "t")


def test_few_tokens_through_a_large_stride_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coarse = replace(
        KL,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(4,) * 5,
    )
    saved(tmp_path / "t", VAEConfig(network=coarse, image_size=128))
    with caplog.at_level(logging.WARNING, "continuar"):
        load_tokenizer(tmp_path / "t")
        assert not caplog.records
        load_tokenizer(tmp_path / "t", Changes(image_size=64))
    assert "(stride 16) are only 16 tokens, which is known to look poor; better: a tokenizer of stride 8" in caplog.text


def config_of(**entries: Any) -> Any:
    return lambda p: (p / TOKENIZER_CONFIG).write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / TOKENIZER_CONFIG).write_text("{"), "tokenizer.json is not valid JSON"),
        (config_of(tokenizer={"kind": "hand"}), "unknown kind of"),
        (config_of(format=2, tokenizer={"kind": "latent"}), "format 2 of a saved"),
        (lambda p: (p / TOKENIZER).unlink(), "tokenizer.safetensors does not exist"),
        (lambda p: (p / TOKENIZER).write_bytes(b"PK"), "truncated or not a safetensors file"),
        (lambda p: write_tensors(p / TOKENIZER, {"x": torch.ones(1)}), "does not fit the model: missing: network."),
        (lambda p: [(p / name).unlink() for name in (TOKENIZER_CONFIG, TOKENIZER)], "it has no config.json"),
    ],
)
def test_load_refuses_in_one_line(harm: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "t")
    harm(tmp_path / "t")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "t")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CONFIGS[0], Changes(ids=True), "has no codebook, so it gives no ids"),
        (CONFIGS[4], Changes(scale=1.0), "scale is 1.0, which a tokenizer of kind 'vq' does not have"),
        (CONFIGS[4], Changes(patch=2), "patch is 2, which a tokenizer of kind 'vq' does not have"),
        (CONFIGS[0], Changes(image_size=9), "nearest allowed: 8 or 10"),
    ],
)
def test_changes_that_a_tokenizer_cannot_have_are_refused(
    config: TokenizerConfig, changes: Changes, message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "t", config)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "t", changes)
    assert message in str(error.value)
