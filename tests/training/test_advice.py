"""What is known to disappoint is said before a run begins: one line, with a better choice."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from continuar.cli.train import dry_run
from continuar.heads import FlowHeadConfig, RegressionHeadConfig
from continuar.models.compatibility import config_warnings
from continuar.recipes import RECIPES
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import LatentConfig, PixelConfig, TokenizerConfig
from continuar.training.config import EMAConfig, Run, run_warnings
from continuar.training.trainer import train
from tests.tiny import IDS, tiny_run, write_images

GOOD = RECIPES["folder"]()
ONE_STEP = replace(GOOD.sampling, steps=1)


def with_(**fields: Any) -> Run:
    return replace(GOOD, **fields)


def pixels(size: int, patch: int) -> PixelConfig:
    return PixelConfig(image_size=size, patch=patch)


def latents(size: int, stride: int = 16, channels: int = 16, patch: int = 1) -> LatentConfig:
    return LatentConfig(image_size=size, stride=stride, channels=channels, patch=patch)


def of_tokens(tokenizer: TokenizerConfig) -> list[str]:
    return config_warnings(tokenizer, replace(GOOD.head, width=4096))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_quiet_but_for_the_control_that_is_meant_to_fail(name: str) -> None:
    assert bool(run_warnings(RECIPES[name]())) == name.endswith("_regression")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (with_(tokenizer=latents(64), sampling=ONE_STEP), r"are only 16 tokens, .* better: a tokenizer of stride 8$"),
        (with_(tokenizer=pixels(256, 4)), r"4x4 pixels are 4,096 tokens, .* better: latents .* or --tokenizer.patch 8$"),
        (with_(tokenizer=pixels(512, 4)), r"16,384 tokens, .* better: latents of an autoencoder \(docs/tokenizers.md\)$"),
        (with_(tokenizer=latents(512, 8, 4)), r"are 4,096 tokens, .* better: --tokenizer.patch 2$"),
        (
            with_(tokenizer=pixels(64, 16), head=replace(GOOD.head, width=1024), sampling=ONE_STEP),
            r"16x16 pixels are known to lose detail; better: --tokenizer.patch 8 or latents",
        ),
        (with_(head=FlowHeadConfig(width=32), sampling=SamplingOptions()), r"32 is narrower .* better: --head.width 48 or more$"),
        (with_(head=RegressionHeadConfig(), sampling=SamplingOptions()), r"a regression head .* better: diffusion$"),
        (
            with_(head=replace(GOOD.head, prediction="epsilon"), train=replace(GOOD.train, images=90_000)),
            r"eps after 90,000 images .* better: --head.prediction v_prediction$",
        ),
        (
            with_(ema=EMAConfig(0.9999, warmup=False), train=replace(GOOD.train, images=128_000)),
            r"holds 90% of the initial weights after 1,000 steps; better: --ema.warmup$",
        ),
        (
            with_(train=replace(GOOD.train, label_dropout=0.0)),
            r"guidance_scale 2.5 needs .* better: --train.label-dropout 0.1, or --sampling.guidance-scale 1$",
        ),
    ],
)
def test_what_is_known_to_disappoint_is_one_line_with_a_better_choice(run: Run, message: str) -> None:
    (line,) = run_warnings(run)
    assert "\n" not in line
    assert re.search(message, line), line


def test_the_better_choice_is_quiet() -> None:
    better = [pixels(64, 4), pixels(128, 4), pixels(256, 8), latents(64, 8, 4), latents(256), latents(512), latents(512, 8, 4, 2)]
    assert [of_tokens(tokenizer) for tokenizer in better] == [[]] * 7
    assert of_tokens(IDS) == []
    longer = with_(head=replace(GOOD.head, prediction="epsilon"), train=replace(GOOD.train, images=2_000_000))
    assert run_warnings(longer) == []


def test_a_run_says_it_once_when_it_begins_and_so_does_a_dry_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(write_images(tmp_path / "data"), images=8, label_dropout=0.0)
    run = replace(run, head=replace(run.head, width=48, prediction="v_prediction"))
    train(run, tmp_path / "r", device=torch.device("cpu"))
    dry_run(run)
    assert [r.message for r in caplog.records if "better:" in r.message] == run_warnings(run) * 2
