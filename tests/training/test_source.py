"""Runs on caches of latents: the tokenizer comes from the cache, they resume to the same bits, what does not fit is refused."""

from __future__ import annotations

import _thread
import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from continuar.checkpoints.mar import latent_sizes
from continuar.checkpoints.store import read_pipeline_config, read_tokenizer
from continuar.checkpoints.tokenizers import load_tokenizer, save_tokenizer, set_scale
from continuar.cli.main import main
from continuar.cli.train import dry_run
from continuar.config import from_json
from continuar.data.latent_cache import LatentCache, read_info
from continuar.errors import UserError
from continuar.heads import CategoricalHeadConfig
from continuar.io import write_tensors
from continuar.models import CausalConfig
from continuar.orders import RasterOrderConfig
from continuar.pipeline import Pipeline, newest_checkpoints
from continuar.recipes import RECIPES
from continuar.recipes.tokenizers import TOKENIZER_RECIPES
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import CodebookConfig, LatentConfig, TokenizerConfig, VAEConfig, VQConfig
from continuar.training.config import Run
from continuar.training.data import LatentStream, reads_cache, training_data
from continuar.training.trainer import Report, train
from tests.tiny import tiny_run, write_images
from tests.tokenizers.networks import KL, VQ, shaken
from tests.training.test_loop import CPU, same_bits

VAE = VAEConfig(network=KL, image_size=8, scale=0.5)
IDS = VQConfig(network=VQ, image_size=8)


def cached(root: Path, config: TokenizerConfig, *options: str) -> Path:
    """A cache of random images, and beside it its tokenizer ``t``."""
    save_tokenizer(config, shaken(config.build()).state_dict(), root / "t")
    images = write_images(root / "data")
    command = ["cache", str(images), str(root / "t"), str(root / "c"), "--device", "cpu", "--shard-images", "5", *options]
    assert main(command) == 0
    return root / "c"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("caches")
    return {"kl": cached(root / "kl", VAE), "vq": cached(root / "vq", IDS)}


def mar_run(path: Path, **loop: Any) -> Run:
    """MAR with diffusion loss whose config knows the tokens' shape, but not the tokenizer."""
    return replace(tiny_run(path, **loop), tokenizer=VAEConfig(network=KL, image_size=8))


def ar_run(path: Path, **loop: Any) -> Run:
    return replace(
        tiny_run(path, **loop),
        tokenizer=IDS,
        order=RasterOrderConfig(),
        backbone=CausalConfig(width=16, depth=2, heads=2),
        head=CategoricalHeadConfig(),
        sampling=SamplingOptions(guidance_scale=2.0),
    )


RUNS = {"kl": mar_run, "vq": ar_run}


@pytest.mark.parametrize("kind", RUNS)
def test_a_model_of_cached_latents_makes_images_by_the_cache_s_tokenizer(
    kind: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "r"
    trained = train(RUNS[kind](caches[kind], sample_images=48), directory, device=CPU)
    own = load_tokenizer(caches[kind].parent / "t")
    kept = from_json(Run, json.loads((directory / "config.json").read_text()))
    assert kept.tokenizer == own.config == read_pipeline_config(newest_checkpoints(directory)[0]).tokenizer
    loaded = Pipeline.from_pretrained(directory, device="cpu")
    assert loaded.config.classes == ("ant", "bee")
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in loaded.tokenizer.state_dict().items())
    images = loaded(["bee", "ant"], [3, 4])
    assert images.shape == (2, 8, 8, 3)
    assert np.array_equal(images, trained(["bee", "ant"], [3, 4]))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped_steps"], "token_std" in line) for line in lines] == [
        (n, 0, kind == "kl") for n in (2, 4, 6)
    ]
    assert len(list((directory / "samples").iterdir())) == 2


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_a_cache_resumes_to_the_same_bits(kind: str, caches: dict[str, Path], tmp_path: Path) -> None:
    run = RUNS[kind](caches[kind])
    train(run, tmp_path / "whole", device=CPU)
    steps = iter(range(9))
    train(run, tmp_path / "r", device=CPU, should_stop=lambda: next(steps) == 2)
    assert newest_checkpoints(tmp_path / "r")[0].name == "step-00000003"
    train(run, tmp_path / "r", device=CPU, resume=True)
    assert same_bits(tmp_path / "r", tmp_path / "whole")


def test_a_resumed_run_keeps_the_tokenizer_of_its_checkpoint(tmp_path: Path) -> None:
    cache, steps = cached(tmp_path, VAE), iter(range(9))
    train(mar_run(cache), tmp_path / "r", device=CPU, should_stop=lambda: next(steps) == 2)
    set_scale(tmp_path / "t", 3.0, 0.0)
    assert training_data(mar_run(cache)).tokenizer.config.scale == 3.0
    trained = train(mar_run(cache), tmp_path / "r", device=CPU, resume=True)
    assert trained.tokenizer.config.scale == trained.config.tokenizer.scale == 0.5
    shutil.rmtree(tmp_path / "t")
    assert training_data(mar_run(cache), resumed=tmp_path / "r").run.tokenizer == VAE


def test_the_tokenizer_may_have_moved(tmp_path: Path) -> None:
    cache = cached(tmp_path, VAE)
    (tmp_path / "t").rename(tmp_path / "moved")
    run = mar_run(cache)
    with pytest.raises(UserError, match="t, which is gone; --data"):
        training_data(run)
    moved = replace(run, data=replace(run.data, tokenizer=str(tmp_path / "moved")))
    assert training_data(moved).run.tokenizer == VAE


def test_a_tokenizer_that_did_not_make_the_cache_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    save_tokenizer(VAE, shaken(VAE.build(), 1).state_dict(), tmp_path / "other")
    run = mar_run(caches["kl"])
    other = replace(run, data=replace(run.data, tokenizer=str(tmp_path / "other")))
    with pytest.raises(UserError, match="was made by another tokenizer"):
        train(other, tmp_path / "r", device=CPU)
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_of_another_tokenizer_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    run = mar_run(caches["kl"], images=16)
    train(run, tmp_path / "r", device=CPU)
    newest = newest_checkpoints(tmp_path / "r")[0]
    write_tensors(newest / "tokenizer.safetensors", shaken(read_tokenizer(newest, VAE), 1).state_dict())
    with pytest.raises(UserError, match="was made by another tokenizer"):
        train(run, tmp_path / "r", device=CPU, resume=True)


def test_a_tokenizer_without_a_scale_is_refused_with_the_command_that_measures_it(tmp_path: Path) -> None:
    cache = cached(tmp_path, replace(VAE, scale=0.0))
    with pytest.raises(UserError) as error:
        train(mar_run(cache), tmp_path / "r", device=CPU)
    command = f"continuar tokenizer stats {read_info(cache).tokenizer} {cache}"
    assert str(error.value).endswith(f"has no scale yet: `{command}` measures it")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()
    assert main(command.split()[1:]) == 0
    train(mar_run(cache, images=8), tmp_path / "r", device=CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_padding": 2}, "data.crop_padding is 2; allowed with a cache of latents: 0"),
        ({"classes": 3}, "the data has 2 classes, data.classes says 3"),
        ({"tokenizer": "nowhere"}, "nowhere"),
    ],
)
def test_what_a_cache_cannot_do_is_refused(change: dict[str, Any], message: str, caches: dict[str, Path]) -> None:
    run = mar_run(caches["kl"])
    with pytest.raises(UserError, match=message):
        training_data(replace(run, data=replace(run.data, **change)))


def test_a_head_that_the_cache_s_tokens_do_not_fit_is_refused(caches: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="diffusion"):
        training_data(mar_run(caches["vq"]))


def test_latents_without_a_cache_are_refused_before_images_are_read(caches: dict[str, Path]) -> None:
    images = caches["kl"].parent / "data"
    for kind, run in (("vae", mar_run(images)), ("vq", ar_run(images)), ("latent", RECIPES["mar_b_imagenet256"]())):
        with pytest.raises(UserError, match=rf"training on latents \(tokenizer '{kind}'\) reads a cache .* `continuar cache DATA"):
            training_data(run)
    pixels = tiny_run(images)
    with pytest.raises(UserError, match="but only a cache of latents has one"):
        training_data(replace(pixels, data=replace(pixels.data, tokenizer="somewhere")))


def test_tokens_of_another_shape_and_missing_mirror_images_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cached(tmp_path, replace(VAE, patch=2), "--no-mirror")
    data = training_data(mar_run(cache))
    assert data.run.tokenizer.spec.grid == (2, 2)
    assert "has no mirror images: data.flip changes nothing" in caplog.text
    assert "the cache's tokens are" in caplog.text


def test_ids_of_a_k_means_codebook_are_cached_and_trained_on(tmp_path: Path) -> None:
    config = CodebookConfig(image_size=8, patch=4, vocabulary=11)
    tokenizer = config.build()
    tokenizer.codebook.copy_(torch.rand(11, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    save_tokenizer(config, tokenizer.state_dict(), tmp_path / "t")
    images = write_images(tmp_path / "data")
    assert main(["cache", str(images), str(tmp_path / "t"), str(tmp_path / "c"), "--device", "cpu"]) == 0
    trained = train(ar_run(tmp_path / "c", images=8), tmp_path / "r", device=CPU)
    assert trained(["ant"], [0]).shape == (1, 8, 8, 3)


def test_a_run_from_before_a_field_was_there_is_continued(caches: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_run(caches["kl"].parent / "data", images=16)
    train(run, tmp_path / "r", device=CPU)
    config = tmp_path / "r" / "config.json"
    older = json.loads(config.read_text())
    del older["data"]["tokenizer"]
    config.write_text(json.dumps(older))
    train(run, tmp_path / "r", device=CPU, resume=True)


def test_dry_run_has_classes_and_tokenizer_of_the_cache(caches: dict[str, Path]) -> None:
    out = dry_run(mar_run(caches["kl"]))
    assert '"scale": 0.5' in out
    assert "classes           2\n" in out
    assert "tokens per image  16 (4 x 4) of dim 3" in out
    assert "tokens per image  16 (4 x 4) of 11 ids" in dry_run(ar_run(caches["vq"]))


@pytest.mark.parametrize(("model", "tokenizer"), [("mar_kl_cifar10", "kl_cifar10"), ("ar_vq_cifar10", "vq_cifar10")])
def test_recipes_take_the_tokens_of_the_tokenizers_they_name(model: str, tokenizer: str) -> None:
    run = RECIPES[model]()
    assert run.tokenizer == TOKENIZER_RECIPES[tokenizer]().tokenizer
    assert run.model_config(10).tokens.seq_len == 64
    assert f"continuar tokenizer train {tokenizer} " in str(RECIPES[model].__doc__)
    assert not reads_cache(run.data)


def test_cache_and_run_agree_on_labels(caches: dict[str, Path]) -> None:
    data, cache = training_data(mar_run(caches["kl"])), LatentCache(caches["kl"])
    tokens, labels = data.stream(data.tokenizer, CPU, range(1)).batch(0)
    assert tokens.shape == (8, 16, 3)
    assert set(labels.tolist()) <= set(cache.labels.tolist())


def test_a_model_of_cached_latents_has_a_place_in_the_official_layout(caches: dict[str, Path], tmp_path: Path) -> None:
    train(mar_run(caches["kl"], images=8), tmp_path / "r", device=CPU)
    assert main(["convert", str(tmp_path / "r"), str(tmp_path / "official.pth")]) == 0
    assert main(["convert", str(tmp_path / "official.pth"), str(tmp_path / "back")]) == 0
    back = read_pipeline_config(tmp_path / "back")
    assert back.tokenizer == LatentConfig("latent", "f2d3", image_size=8, stride=2, channels=3, scale=0.5)
    shifted = replace(back, tokenizer=replace(VAE, shift=0.1))
    with pytest.raises(UserError, match=r"tokenizer.shift is 0.1, which the official layout has no place for; allowed: 0"):
        latent_sizes(shifted)


def damaged(cache: Path) -> Path:
    """Cuts the first shard in half and keeps the whole one beside it."""
    shard = cache / "shard-00000.bin"
    shard.with_suffix(".whole").write_bytes(shard.read_bytes())
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    return shard


def test_a_shard_that_becomes_unreadable_stops_the_run_which_then_goes_on(tmp_path: Path) -> None:
    cache = cached(tmp_path, VAE)
    run = mar_run(cache)
    train(run, tmp_path / "whole", device=CPU)

    def break_it(report: Report) -> None:
        if report.step == 3:
            damaged(cache)

    with pytest.raises(UserError) as stop:
        train(run, tmp_path / "r", device=CPU, on_report=break_it)
    kept = newest_checkpoints(tmp_path / "r")[0]
    lost = r"the data of step [45] could not be read \(OSError: .*shard-00000.bin ends before byte [0-9,]+\)"
    assert re.fullmatch(rf"{lost}; {kept} is intact, and --resume continues from it", str(stop.value)), str(stop.value)
    (cache / "shard-00000.whole").replace(cache / "shard-00000.bin")
    train(run, tmp_path / "r", device=CPU, resume=True)
    assert same_bits(tmp_path / "r", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reading_thread_that_is_ended_stops_the_run_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: dict[str, Path]
) -> None:
    run, real, readers = mar_run(caches["kl"]), LatentStream.read, []

    def read(self: LatentStream, step: int, slot: int = 0) -> Any:
        readers.append(threading.current_thread())
        return _thread.exit() if step == 3 else real(self, step, slot)  # ends the thread that calls it, silently

    monkeypatch.setattr(LatentStream, "read", read)
    with pytest.raises(UserError, match=r"data of step 4 could not be read \(its thread was ended\); .*step-00000002 is"):
        train(run, tmp_path / "r", device=CPU)
    assert threading.main_thread() not in readers
    assert not any(reader.is_alive() for reader in readers)
    monkeypatch.undo()
    train(run, tmp_path / "whole", device=CPU)
    train(run, tmp_path / "r", device=CPU, resume=True)
    assert same_bits(tmp_path / "r", tmp_path / "whole")


def test_data_that_is_lost_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    cache = cached(tmp_path, VAE)
    lost = (cache / "shard-00000.bin").unlink
    with pytest.raises(UserError, match=r"\(FileNotFoundError: .*shard-00000.bin.*\); there is no checkpoint before it"):
        train(mar_run(cache, save_images=0), tmp_path / "r", device=CPU, on_report=lambda report: lost(missing_ok=True))
