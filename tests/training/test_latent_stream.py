"""Training batches from a cache of latents."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from continuar.checkpoints.tokenizers import Changes, load_tokenizer, save_tokenizer
from continuar.cli.main import main
from continuar.data.latent_cache import LatentCache
from continuar.tokenizers import Tokenizer, VAEConfig, VQConfig
from continuar.training.data import IndexStream, LatentStream
from tests.tiny import write_images
from tests.tokenizers.networks import KL, VQ, shaken

CPU = torch.device("cpu")


def made(tmp_path: Path, config: VAEConfig | VQConfig, *options: str) -> tuple[LatentCache, Tokenizer]:
    root = write_images(tmp_path / "data")
    tokenizer = shaken(config.build())
    save_tokenizer(config, tokenizer.state_dict(), tmp_path / "t")
    command = ["cache", str(root), str(tmp_path / "t"), str(tmp_path / "c"), "--device", "cpu", "--shard-images", "5"]
    assert main([*command, *options]) == 0
    return LatentCache(tmp_path / "c"), tokenizer


def stream(cache: LatentCache, tokenizer: Tokenizer, flip: bool = True, seed: int = 3) -> LatentStream:
    return LatentStream(cache, tokenizer, flip=flip, batch_size=8, seed=seed, device=CPU)


def test_batches_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VAEConfig(network=KL, image_size=8, scale=0.5))
    forward = stream(cache, tokenizer)
    seen = []
    for step in range(5):
        torch.manual_seed(step)
        seen.append(forward.batch(step))
    resumed = stream(cache, tokenizer)
    for step in (3, 4, 0, 2):
        torch.manual_seed(step)
        tokens, labels = resumed.batch(step)
        assert torch.equal(tokens, seen[step][0])
        assert torch.equal(labels, seen[step][1])
    assert tokens.shape == (8, 16, 3)
    assert not torch.equal(stream(cache, tokenizer, seed=4).batch(0)[1], seen[0][1])


def test_latents_are_those_of_the_rows_and_half_are_mirrored(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VAEConfig(network=KL, image_size=8, scale=0.5))
    both = torch.stack([cache.read(np.arange(12), view) for view in (0, 1)], 1)
    index, mirrored, total = IndexStream(12, 8, 3), 0, 0
    for step in range(40):
        latents, labels = stream(cache, tokenizer).read(step)
        rows = index.batch(step)
        is_view = torch.stack([(latents == both[rows, v]).flatten(1).all(1) for v in (0, 1)], 1)
        assert is_view.any(1).all()
        assert torch.equal(labels, torch.from_numpy(cache.labels[rows]))
        mirrored, total = mirrored + int(is_view[:, 1].sum()), total + len(rows)
    assert 0.4 < mirrored / total < 0.6
    plain, _ = stream(cache, tokenizer, flip=False).read(7)
    assert torch.equal(plain, both[index.batch(7), 0])


def test_micro_batches_are_parts_of_the_batch_whoever_asks_for_them(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VAEConfig(network=KL, image_size=8, scale=0.5))
    for slots in (range(4), range(2, 4)):
        parts = LatentStream(cache, tokenizer, flip=True, batch_size=8, seed=3, device=CPU, micro_batch=2, slots=slots)
        for step in range(3):
            latents, labels = stream(cache, tokenizer).read(step)
            for slot in slots:
                torch.manual_seed(9)
                tokens, found = parts.batch(step, slot)
                torch.manual_seed(9)
                expected = tokenizer.tokenize(latents[2 * slot : 2 * slot + 2])
                assert torch.equal(tokens, expected)
                assert torch.equal(found, labels[2 * slot : 2 * slot + 2])
                assert parts._ahead is not None
                assert parts._ahead.place == ((step, slot + 1) if slot < 3 else (step + 1, slots.start))


def test_a_cache_without_mirror_images_is_read_as_it_is(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VAEConfig(network=KL, image_size=8, scale=0.5), "--no-mirror")
    assert torch.equal(stream(cache, tokenizer).read(2)[0], stream(cache, tokenizer, flip=False).read(2)[0])


def test_the_posterior_is_drawn_anew_at_every_use(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VAEConfig(network=KL, image_size=8, scale=0.5))
    batches = stream(cache, tokenizer, flip=False)
    torch.manual_seed(0)
    first, second = batches.batch(0)[0], batches.batch(0)[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("off", "warned"), [(1.0, False), (1.05, False), (1.3, True), (0.7, True)])
def test_tokens_far_from_unit_deviation_are_said_once(
    off: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, _ = made(tmp_path, VAEConfig(network=KL, image_size=8))
    assert main(["tokenizer", "stats", str(tmp_path / "t"), str(tmp_path / "c"), "--device", "cpu"]) == 0
    scale = off * load_tokenizer(tmp_path / "t").config.scale
    batches = LatentStream(
        cache, load_tokenizer(tmp_path / "t", Changes(scale=scale)), flip=True, batch_size=120, seed=0, device=CPU
    )
    torch.manual_seed(0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "continuar"):
        for step in range(3):
            batches.batch(step)
    assert len([r for r in caplog.records if "tokens have std" in r.message]) == int(warned)


def test_ids_come_as_whole_numbers(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VQConfig(network=VQ, image_size=8))
    tokens, _ = stream(cache, tokenizer).batch(0)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (8, 16))


def test_a_tokenizer_without_a_scale_is_refused(tmp_path: Path) -> None:
    cache, tokenizer = made(tmp_path, VAEConfig(network=KL, image_size=8))
    with pytest.raises(ValueError, match="no scale yet"):
        stream(cache, tokenizer).batch(0)
