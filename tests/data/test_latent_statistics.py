"""Statistics of latents: closed forms, an independent computation, and the command that keeps the scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from continuar.checkpoints.tokenizers import load_tokenizer, save_tokenizer
from continuar.cli.main import main
from continuar.data.cache_build import encoded, measure
from continuar.data.loader import load_images
from continuar.data.sources import find_source
from continuar.errors import UserError
from continuar.tokenizers import PixelConfig, VAEConfig, VAETokenizer, VQConfig
from continuar.tokenizers.pixel import to_signed
from tests.tiny import write_images
from tests.tokenizers.networks import KL, TINY, VQ, shaken


def tokenizer(**changes) -> VAETokenizer:
    return shaken(VAEConfig(**({"network": KL, "image_size": 8} | changes)).build())


SHAPES = st.tuples(st.integers(2, 9), st.just(3), st.just(2), st.just(2))


@given(arrays.arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32)))
def test_sums_are_the_mean_and_deviation_of_all_values(values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    if values.std() < 1e-3:
        return
    found = measure(x.split(2), has_variance=False)
    exact = values.astype(np.float64)
    assert found.images == len(values)
    assert found.mean == pytest.approx(exact.mean(), abs=1e-9)
    assert found.std == pytest.approx(exact.std(), rel=1e-9)
    np.testing.assert_allclose(found.channel_std, exact.std((0, 2, 3)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.channel_mean, exact.mean((0, 2, 3)), atol=1e-9)


def test_the_posteriors_variance_counts() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(64, 2, 8, 8) * 3 + 1, torch.randn(64, 2, 8, 8)
    found = measure([torch.cat((mean, log_variance), 1)], has_variance=True)
    draws = mean + (log_variance / 2).exp() * torch.randn(100, *mean.shape)
    assert found.std == pytest.approx(draws.std().item(), rel=2e-3)
    assert found.mean == pytest.approx(draws.mean().item(), abs=5e-3)
    assert found.std > mean.std().item() * 1.05
    assert found.scale == 1 / found.std


def test_large_offsets_lose_no_digits() -> None:
    x = 1000 + torch.randn(200, 1, 16, 16)
    found = measure(x.split(10), has_variance=False)
    assert found.std == pytest.approx(x.double().std(correction=0).item(), rel=1e-7)


@pytest.mark.parametrize(("latents", "message"), [([], "no images"), ([torch.ones(2, 1, 2, 2)], "standard deviation is 0")])
def test_nothing_to_measure_is_refused(latents: list[torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(latents, has_variance=False)


def test_a_measured_scale_gives_tokens_of_unit_deviation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_images(tmp_path / "data", per_class=20)
    plain = tokenizer()
    save_tokenizer(plain.config, plain.state_dict(), tmp_path / "t")
    assert main(["tokenizer", "stats", str(tmp_path / "t"), str(root), "--shift", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "images    40" in out
    assert "channel 2" in out
    again = load_tokenizer(tmp_path / "t")
    images = to_signed(torch.from_numpy(load_images(root, size=8).images))
    torch.manual_seed(0)
    tokens = torch.cat([again.tokenize(again.encode(images)) for _ in range(50)])
    assert tokens.std().item() == pytest.approx(1, abs=5e-3)
    assert tokens.mean().item() == pytest.approx(0, abs=5e-3)
    assert main(["tokenizer", "stats", str(tmp_path / "t"), str(root), "--device", "cpu"]) == 0
    assert "(was " in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "t").config.shift == 0


def test_images_may_be_fewer_and_are_spread_evenly(tmp_path: Path) -> None:
    source = find_source(write_images(tmp_path / "data", per_class=6), "train")
    latents = list(encoded(source, tokenizer(), images=4, batch_size=3))
    assert [len(x) for x in latents] == [3, 1]
    everything = torch.cat(list(encoded(source, tokenizer())))
    torch.testing.assert_close(torch.cat(latents), everything[[0, 3, 6, 9]])


def test_stats_dry_run_and_out_leave_the_tokenizer_alone(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data")
    plain = tokenizer(network=TINY, patch=2)
    save_tokenizer(plain.config, plain.state_dict(), tmp_path / "t")
    command = ["tokenizer", "stats", str(tmp_path / "t"), str(root), "--device", "cpu", "--images", "5"]
    assert main([*command, "--dry-run"]) == 0
    assert main([*command, "--out", str(tmp_path / "other")]) == 0
    assert load_tokenizer(tmp_path / "t").config.scale == 0
    assert load_tokenizer(tmp_path / "other").config.scale > 0
    assert load_tokenizer(tmp_path / "other").config.patch == 2


def test_stats_takes_a_diffusers_directory_with_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_images(tmp_path / "data")
    KL.build().save_pretrained(tmp_path / "vae")
    command = ["tokenizer", "stats", str(tmp_path / "vae"), str(root), "--image-size", "8", "--device", "cpu"]
    assert main(command) == 2
    assert "is not a saved tokenizer, which could keep its scale; give --out DIR" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "kept")]) == 0
    assert load_tokenizer(tmp_path / "kept").config.image_size == 8


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (VQConfig(network=VQ, image_size=8), [], "is a tokenizer of kind 'vq', which needs no scale"),
        (PixelConfig(image_size=8, std=0.5), [], "is a tokenizer of kind 'pixel', which needs no scale"),
        (VAEConfig(network=KL, image_size=8), ["--images", "0"], "--images is 0; allowed: 1 or more"),
        (VAEConfig(network=KL, image_size=8), ["--batch-size", "0"], "--batch-size is 0; allowed: 1 or more"),
        (VAEConfig(network=KL, image_size=8), ["--image-size", "9"], "image size 9 is not divisible"),
        (VAEConfig(network=KL, image_size=8), ["--split", "x"], ""),
    ],
)
def test_stats_refuses_in_one_line(config, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_images(tmp_path / "data")
    built = config.build()
    save_tokenizer(config, built.state_dict(), tmp_path / "t")
    code = main(["tokenizer", "stats", str(tmp_path / "t"), str(root), "--device", "cpu", *options])
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err


def test_tokenizer_save_keeps_size_patch_and_scale(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    VQ.build().save_pretrained(tmp_path / "vae")
    options = ["--image-size", "8", "--patch", "2", "--scale", "0.5"]
    assert main(["tokenizer", "save", str(tmp_path / "vae"), str(tmp_path / "t"), *options]) == 0
    config = load_tokenizer(tmp_path / "t").config
    assert (config.image_size, config.patch, config.scale) == (8, 2, 0.5)
    assert main(["tokenizer", "save", str(tmp_path / "vae"), str(tmp_path / "ids"), "--image-size", "8", "--ids"]) == 0
    assert load_tokenizer(tmp_path / "ids").spec.vocabulary == 11
    assert main(["tokenizer", "save", str(tmp_path / "vae"), str(tmp_path / "vae"), "--image-size", "8"]) == 2
    assert "exists and is not a saved tokenizer" in capsys.readouterr().err
    assert main(["tokenizer", "list"]) == 0
    assert "kl16_mar     AutoencoderKL" in capsys.readouterr().out
    assert main(["tokenizer", "tsats"]) == 2
    assert "unknown tokenizer command 'tsats'; did you mean stats?" in capsys.readouterr().err
