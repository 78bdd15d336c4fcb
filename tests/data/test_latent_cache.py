"""Caches of latents: made, killed, continued, shared between processes, damaged, rebuilt, refused."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from continuar.checkpoints.tokenizers import save_tokenizer
from continuar.cli.main import main
from continuar.data.cache_build import CacheOptions, build_cache
from continuar.data.latent_cache import INDEX, LatentCache, read_info
from continuar.data.loader import load_images
from continuar.data.sources import find_source
from continuar.errors import UserError
from continuar.tokenizers import (
    LatentConfig,
    PixelConfig,
    PixelTokenizer,
    Tokenizer,
    TokenizerConfig,
    VAEConfig,
    VQConfig,
    fingerprint,
)
from continuar.tokenizers.pixel import to_signed
from tests.tiny import write_images
from tests.tokenizers.networks import KL, VQ, shaken

PIXELS = PixelConfig(image_size=8, patch=2, std=0.5)


def saved(path: Path, config: TokenizerConfig, seed: int = 0) -> Tokenizer:
    tokenizer = shaken(config.build(), seed)
    save_tokenizer(config, tokenizer.state_dict(), path)
    return tokenizer


def cache(root: Path, tokenizer: Path, destination: Path, *options: str) -> int:
    return main(["cache", str(root), str(tokenizer), str(destination), "--shard-images", "5", "--device", "cpu", *options])


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != INDEX}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.mark.parametrize("config", [VAEConfig(network=KL, image_size=8, scale=0.5), VQConfig(network=VQ, image_size=8), PIXELS])
def test_a_cache_holds_the_latents_of_every_image_and_its_mirror_image(config: TokenizerConfig, root: Path, tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", config)
    assert cache(root, tmp_path / "t", tmp_path / "c", "--dtype", "float32", "--batch-size", "4") == 0
    found, images = LatentCache(tmp_path / "c"), load_images(root, size=8)
    assert (len(found), found.info.shards, found.info.classes) == (12, 3, images.classes)
    assert np.array_equal(found.labels, images.labels)
    assert np.array_equal(found.index, np.arange(12))
    x = to_signed(torch.from_numpy(images.images))
    for view, expected in ((0, tokenizer.encode(x)), (1, tokenizer.encode(x.flip(-1)))):
        torch.testing.assert_close(found.read(np.arange(12), view).to(expected.dtype), expected)
    shuffled, views = np.array([11, 3, 3, 0]), np.array([0, 1, 0, 1])
    both = torch.stack([found.read(np.arange(12), v) for v in (0, 1)], 1)
    assert torch.equal(found.read(shuffled, views), both[shuffled, views])
    assert found.read(np.array([], np.int64)).shape[0] == 0
    assert found.info.fingerprint == fingerprint(tokenizer)
    tokens = tokenizer.tokenize(found.read(shuffled))
    assert tokens.shape[:2] == (4, config.spec.seq_len)


def test_bfloat16_rounds_once(root: Path, tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "t", VAEConfig(network=KL, image_size=8))
    assert cache(root, tmp_path / "t", tmp_path / "c", "--no-mirror", "--batch-size", "12") == 0
    found = LatentCache(tmp_path / "c")
    expected = tokenizer.encode(to_signed(torch.from_numpy(load_images(root, size=8).images)))
    torch.testing.assert_close(found.read(np.arange(12)).float(), expected, rtol=2**-8, atol=1e-5)
    assert found.info.row_bytes == 6 * 4 * 4 * 2
    assert (tmp_path / "c" / "shard-00000.bin").stat().st_size == 5 * found.info.row_bytes


def test_broken_images_are_named_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_images(tmp_path / "data")
    broken = sorted((root / "bee").iterdir())[1]
    broken.write_bytes(b"no image")
    saved(tmp_path / "t", PIXELS)
    assert cache(root, tmp_path / "t", tmp_path / "c", "--max-skipped-share", "0.1") == 0
    assert f"skipped  {broken}: " in capsys.readouterr().out
    found = LatentCache(tmp_path / "c")
    assert found.index.tolist() == [i for i in range(12) if i != 7]
    assert found.labels.tolist() == [0] * 6 + [1] * 5
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 0
    assert "rows       11 of 12 images" in capsys.readouterr().out
    assert cache(root, tmp_path / "t", tmp_path / "strict", "--max-skipped-share", "0.01") == 2
    assert "1 of 12 images cannot be used" in capsys.readouterr().err


def cache_slowly(root: Path, tokenizer: Path, destination: Path) -> None:
    """In a process of its own: 20 ms per batch."""
    real = PixelTokenizer.encode

    def encode(self: PixelTokenizer, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return real(self, images)

    PixelTokenizer.encode = encode
    cache(root, tokenizer, destination, "--batch-size", "1")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_process_leaves_nothing_half_written_and_the_same_command_goes_on(root: Path, tmp_path: Path) -> None:
    saved(tmp_path / "t", PIXELS)
    assert cache(root, tmp_path / "t", tmp_path / "whole") == 0
    expected, destination = content(tmp_path / "whole"), tmp_path / "c"
    complete = 0
    # Killed while a shard is being written, between its files, when it is complete: whatever has a name is whole.
    for number, awaited in enumerate((INDEX, ".shard-00000.bin.*.tmp", "shard-00000.bin", "shard-00000.json", "shard-00001.bin")):
        process = multiprocessing.get_context("fork").Process(target=cache_slowly, args=(root, tmp_path / "t", destination))
        process.start()
        while process.is_alive() and not list(destination.glob(awaited)):
            time.sleep(0.0005)
        time.sleep(0.011 * (number % 2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert read_info(destination).count == 12
        there = content(destination)
        assert {name: data for name, data in there.items() if not name.startswith(".") and data != expected[name]} == {}
        shards = [name for name in there if name.endswith(".json") and not name.startswith(".")]
        assert len(shards) >= complete
        complete = len(shards)
        with pytest.raises(UserError, match=rf"is not complete: {complete} of 3 shards are there; the same `continuar cache`"):
            LatentCache(destination)
    assert complete > 0
    assert cache(root, tmp_path / "t", destination) == 0
    assert content(destination) == expected


def test_processes_of_torchrun_share_the_work(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "t", PIXELS)
    cache(root, tmp_path / "t", tmp_path / "alone")
    made = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cache(root, tmp_path / "t", tmp_path / "c") == 0
        made.append(sorted(p.name for p in (tmp_path / "c").glob("*.json")))
    assert made == [[INDEX, "shard-00001.json"], [INDEX, *(f"shard-0000{i}.json" for i in range(3))]]
    assert content(tmp_path / "c") == content(tmp_path / "alone")
    monkeypatch.setenv("RANK", "2")
    assert cache(root, tmp_path / "t", tmp_path / "c") == 2


def test_a_full_disk_is_one_line_and_leaves_whole_shards(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "t", PIXELS)
    row = 2 * 3 * 8 * 8 * 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The last shard has two rows, the others five: a limit between stops at the first.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * row, before[1]))
    try:
        assert cache(root, tmp_path / "t", tmp_path / "c", "--batch-size", "1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "shard-00000.bin cannot be written: File too large; 0 of 3 shards are complete" in error
    assert [p.name for p in (tmp_path / "c").iterdir()] == [INDEX]
    assert cache(root, tmp_path / "t", tmp_path / "c") == 0
    assert len(LatentCache(tmp_path / "c")) == 12


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_damaged_shards_are_named_and_rebuilt_on_request(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "t", PIXELS)
    cache(root, tmp_path / "t", tmp_path / "c")
    whole = content(tmp_path / "c")
    flip_a_bit(tmp_path / "c" / "shard-00001.bin")
    assert main(["cache", "check", str(tmp_path / "c")]) == 2
    assert "wrong checksum of shard-00001.bin; `continuar cache ... --rebuild` makes them anew" in capsys.readouterr().err
    assert cache(root, tmp_path / "t", tmp_path / "c") == 0
    assert "shards   0 made now" in capsys.readouterr().out
    assert cache(root, tmp_path / "t", tmp_path / "c", "--rebuild") == 0
    assert "shards   1 made now, 3 of 3 complete" in capsys.readouterr().out
    assert content(tmp_path / "c") == whole


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: (c / "shard-00001.bin").write_bytes(b"x"), "shard-00001.bin has 1 bytes; 3840 are expected (--rebuild"),
        (lambda c: (c / "shard-00001.bin").unlink(), "shard-00001.bin has 0 bytes"),
        (lambda c: (c / "shard-00001.json").unlink(), "is not complete: 2 of 3 shards are there"),
        (lambda c: (c / "shard-00001.json").write_text(""), "shard-00001.json is not valid JSON"),
        (lambda c: (c / "shard-00001.json").write_text("{}"), "lacks the field 'labels'"),
        (lambda c: edit(c / "shard-00001.json", labels=[0]), "has 1 labels and 0 skipped images; 5 are expected"),
        (lambda c: (c / INDEX).unlink(), "is not a cache of latents: it has no cache.json"),
        (lambda c: (c / INDEX).write_text("{"), "cache.json is not valid JSON"),
        (lambda c: edit(c / INDEX, format=2), "format 2 of a cache of latents; this version reads 1"),
        (lambda c: edit(c / INDEX, views=3), "views of a cache is 3; allowed: 1 or 2"),
        (lambda c: edit(c / INDEX, dtype="int8"), "dtype"),
        (lambda c: edit(c / INDEX, shape=[]), "shape of a cache is ()"),
        (lambda c: edit(c / INDEX, shard_images=0), "shard_images of a cache is 0"),
    ],
)
def test_reading_refuses_in_one_line(harm: Any, message: str, root: Path, tmp_path: Path) -> None:
    saved(tmp_path / "t", PIXELS)
    cache(root, tmp_path / "t", tmp_path / "c")
    harm(tmp_path / "c")
    with pytest.raises(UserError) as error:
        LatentCache(tmp_path / "c")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_cache_of_another_tokenizer_or_of_other_data_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = VAEConfig(network=KL, image_size=8)
    saved(tmp_path / "t", config)
    saved(tmp_path / "other", config, seed=1)
    assert cache(root, tmp_path / "t", tmp_path / "c") == 0
    before = content(tmp_path / "c")
    assert cache(root, tmp_path / "other", tmp_path / "c") == 2
    assert f"was made by another tokenizer (fingerprint {read_info(tmp_path / 'c').fingerprint[:12]}" in capsys.readouterr().err
    assert cache(root, tmp_path / "t", tmp_path / "c", "--dtype", "float32") == 2
    assert 'is another cache (dtype: "bfloat16" -> "float32")' in capsys.readouterr().err
    fewer = write_images(tmp_path / "fewer", per_class=2)
    assert cache(fewer, tmp_path / "t", tmp_path / "c") == 2
    assert "count: 12 -> 4" in capsys.readouterr().err
    assert content(tmp_path / "c") == before
    with pytest.raises(UserError, match="was made by another tokenizer"):
        LatentCache(tmp_path / "c").check_fingerprint(fingerprint(shaken(config.build(), 1)))
    assert main(["cache", "check", str(tmp_path / "c"), "--tokenizer", str(tmp_path / "other"), "--device", "cpu"]) == 2
    assert "was made by another tokenizer" in capsys.readouterr().err
    assert main(["tokenizer", "stats", str(tmp_path / "other"), str(tmp_path / "c"), "--device", "cpu"]) == 2
    assert "was made by another tokenizer" in capsys.readouterr().err


def test_a_scale_measured_on_the_cache_is_that_of_the_images(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "t", VAEConfig(network=KL, image_size=8))
    cache(root, tmp_path / "t", tmp_path / "c", "--dtype", "float32")
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 0
    assert "scale      the tokenizer has none" in capsys.readouterr().out
    assert main(["tokenizer", "stats", str(tmp_path / "t"), str(tmp_path / "c"), "--device", "cpu"]) == 0
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu", "--out", str(tmp_path / "both.png")]) == 0
    out = capsys.readouterr().out
    assert "images    24" in out
    assert "tokens     std 1.0000" in out
    assert "labels     as in the source, 2 classes" in out
    assert Image.open(tmp_path / "both.png").width > 8


def test_check_decodes_and_compares_with_the_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_images(tmp_path / "data")
    saved(tmp_path / "t", PIXELS)
    cache(root, tmp_path / "t", tmp_path / "c", "--dtype", "float32")
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 0
    assert "decoded    PSNR inf dB against the source" in capsys.readouterr().out
    image = root / "ant" / "0.png"
    (root / "bee" / "9.png").write_bytes(image.read_bytes())
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 2
    assert "has 13 images; the cache was made of 12" in capsys.readouterr().err
    (root / "bee" / "9.png").unlink()
    image.rename(root / "bee" / "00.png")
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 2
    assert "1 labels differ from the source: row 5 has the label 0" in capsys.readouterr().err
    (root / "bee" / "00.png").rename(image)
    Image.new("RGB", (8, 8)).save(image)
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 2
    assert "latents of the source, encoded anew, differ by" in capsys.readouterr().err
    (root / "ant").rename(root / "aunt")
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 2
    assert "has other classes than when the cache was made" in capsys.readouterr().err
    assert main(["cache", "check", str(tmp_path / "c"), "--data", str(tmp_path / "nothing")]) == 2
    assert main(["cache", "check", str(tmp_path / "c"), "--samples", "0"]) == 2


def test_check_notices_a_scale_that_is_off(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = saved(tmp_path / "t", VAEConfig(network=KL, image_size=8, scale=7.0))
    cache(root, tmp_path / "t", tmp_path / "c")
    assert main(["cache", "check", str(tmp_path / "c"), "--device", "cpu"]) == 0
    assert "more than 10% off 1: measure the scale again" in capsys.readouterr().out
    assert tokenizer.config.scale == 7


def test_latents_that_are_not_finite_are_refused(root: Path, tmp_path: Path) -> None:
    tokenizer: Any = shaken(VAEConfig(network=KL, image_size=8).build())
    tokenizer.network.quant_conv.bias[0] = float("nan")
    source, where = find_source(root, "train"), ("t", str(root), "train")
    with pytest.raises(UserError, match="latents that are not finite"):
        build_cache(source, tokenizer, tmp_path / "c", CacheOptions(), where=where)
    assert [p.name for p in (tmp_path / "c").iterdir()] == [INDEX]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-images", "0"], "shard-images is 0; allowed: 1 or more"),
        (["--batch-size", "0"], "batch-size is 0; allowed: 1 or more"),
        (["--max-skipped-share", "2"], "max-skipped-share is 2.0; allowed: 0 to 1"),
        (["--image-size", "9"], "image size 9 is not divisible by stride x patch = 2 x 1"),
        (["--ids"], "has no codebook, so it gives no ids"),
    ],
)
def test_cache_refuses_options_and_writes_nothing(
    options: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved(tmp_path / "t", VAEConfig(network=KL, image_size=8))
    assert cache(root, tmp_path / "t", tmp_path / "c", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_cache_refuses_destinations_and_tokenizers(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path / "t", PIXELS)
    assert cache(root, tmp_path / "t", root) == 2
    assert "exists and is not a cache of latents; choose another directory" in capsys.readouterr().err
    (tmp_path / "file").write_text("kept")
    assert cache(root, tmp_path / "t", tmp_path / "file") == 2
    assert "is a file; allowed: a directory for the cache" in capsys.readouterr().err
    latent = LatentConfig(image_size=32)
    save_tokenizer(latent, {}, tmp_path / "latent")
    assert cache(root, tmp_path / "latent", tmp_path / "c") == 2
    assert "is a tokenizer without an encoder" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert main(["cache", "check", str(tmp_path / "t")]) == 2
    assert "is not a cache of latents" in capsys.readouterr().err


def test_a_killed_writer_of_the_index_does_not_block_the_directory(root: Path, tmp_path: Path) -> None:
    saved(tmp_path / "t", PIXELS)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f".{INDEX}.123.tmp").write_text("{")
    assert cache(root, tmp_path / "t", tmp_path / "c") == 0
    assert len(LatentCache(tmp_path / "c")) == 12


def test_info_of_a_cache_survives_json(root: Path, tmp_path: Path) -> None:
    saved(tmp_path / "t", PIXELS)
    cache(root, tmp_path / "t", tmp_path / "c", "--split", "train")
    info = read_info(tmp_path / "c")
    assert (info.tokenizer, info.source) == (str(tmp_path / "t"), str(root))
    assert (info.count, info.views, info.dtype, info.shape) == (12, 2, "bfloat16", (3, 8, 8))
    assert replace(info, count=11).shards == 3
