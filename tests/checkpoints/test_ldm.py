"""Autoencoders in LDM's layout: read, written, converted and used."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continuar.checkpoints.ldm import is_ldm, network_from_ldm, read_ldm, to_diffusers
from continuar.checkpoints.tokenizers import Changes, load_tokenizer, read_tokenizer_file, save_tokenizer
from continuar.cli.main import main as continuar
from continuar.io import read_tensors
from continuar.tokenizers import VAEConfig
from continuar.tokenizers.vae import KL8_LDM, KL16_LDM, KL16_MAR, NAMED, VQ16_LDM
from tests.tokenizers.networks import KL as SMALL_GROUPS
from tests.tokenizers.networks import TINY

from . import layout, ldm_reference
from .files import content, convert, refused
from .ldm_reference import Sizes, decode, encode, quantise, random_state

KL = Sizes()
KL_ATTENTION = Sizes(widths=(32, 32, 64), layers=2, latent=5, encoder_attention=(2,), decoder_attention=(2, 0))
KL_HALF = replace(KL_ATTENTION, decoder_attention=())
VQ = Sizes(latent=6, codes=17, embed=3, encoder_attention=(1,), decoder_attention=(1,))
every_layout = pytest.mark.parametrize("sizes", [KL, KL_ATTENTION, KL_HALF, VQ], ids=["kl", "attention", "encoder-only", "vq"])
LOSS = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(1)}


def saved(path: Path, sizes: Sizes = KL, wrapper: str | None = "state_dict", **others: Any) -> Path:
    state = random_state(sizes) | others
    torch.save(state if wrapper is None else {wrapper: state, "global_step": 3}, path)
    return path


def pixels(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@every_layout
def test_a_file_gives_the_latents_and_images_of_the_reference(sizes: Sizes, tmp_path: Path) -> None:
    path, state = saved(tmp_path / "a.ckpt", sizes), random_state(sizes)
    tokenizer: Any = load_tokenizer(path, Changes(image_size=16, scale=0.5))
    latents = encode(state, pixels())
    torch.testing.assert_close(tokenizer.encode(pixels()), latents, rtol=1e-4, atol=1e-4)
    z = latents if sizes.codes else latents.chunk(2, 1)[0]
    expected = decode(state, quantise(state, z)[1] if sizes.codes else z)
    found = tokenizer.config.network.decode(tokenizer.network, z)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.spec.dim == (sizes.embed if sizes.codes else sizes.latent)


def test_ids_of_a_vq_file_are_those_of_the_reference(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "a.ckpt", VQ), Changes(image_size=16, ids=True))
    state = random_state(VQ)
    ids, codes = quantise(state, encode(state, pixels()))
    assert torch.equal(tokenizer.encode(pixels()), ids)
    torch.testing.assert_close(tokenizer.decode(ids), decode(state, codes).clamp(-1, 1), rtol=1e-4, atol=1e-4)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convert_there_and_back_keeps_every_bit(sizes: Sizes, dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(sizes, dtype)
    torch.save({"model": state | LOSS}, tmp_path / "a.ckpt")
    assert convert([str(tmp_path / "a.ckpt"), str(tmp_path / "saved"), "--image-size", "16"]) == 0
    assert convert([str(tmp_path / "saved"), str(tmp_path / "b.ckpt")]) == 0
    found = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == state.keys()
    assert all(found[k].dtype is dtype and torch.equal(found[k], v) for k, v in state.items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_wrappers_and_loss_keys_are_understood(wrapper: str | None, tmp_path: Path) -> None:
    network, state = read_ldm(saved(tmp_path / "a.ckpt", KL, wrapper, **LOSS))
    assert network.stride == 2
    assert not any("loss" in k for k in state)
    assert is_ldm(tmp_path / "a.ckpt")


def test_safetensors_in_this_layout_are_read(tmp_path: Path) -> None:
    save_file(random_state(KL), tmp_path / "a.safetensors")
    assert load_tokenizer(tmp_path / "a.safetensors", Changes(image_size=16)).spec.dim == 4


def test_callback_classes_of_older_lightning_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = callback
    torch.save({"state_dict": random_state(KL), "callbacks": {callback: {"best": 1.0}}}, tmp_path / "a.ckpt")
    assert read_ldm(tmp_path / "a.ckpt")[0].stride == 2


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        (KL16_LDM, Sizes((128, 128, 256, 256, 512), 2, 16, encoder_attention=(4,), decoder_attention=(4,))),
        (KL16_MAR, Sizes((128, 128, 256, 256, 512), 2, 16, encoder_attention=(4,))),
        (KL8_LDM, Sizes((128, 256, 512, 512), 2, 4)),
        (VQ16_LDM, Sizes((128, 128, 256, 256, 512), 2, 8, 16384, 8, (4,), (4,))),
    ],
    ids=["kl16", "kl16_mar", "kl8", "vq16"],
)
def test_files_of_table_2_are_recognised(network: Any, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shapes alone: no value is made.
    monkeypatch.setattr(ldm_reference, "_values", lambda name, shape, generator: torch.empty(shape, device="meta"))
    state = random_state(sizes)
    assert network_from_ldm(state) == network
    with torch.device("meta"):
        expected = network.build().state_dict()
    monkeypatch.setattr("continuar.checkpoints.ldm.separate", lambda state: state)
    assert {k: v.shape for k, v in to_diffusers(state, network).items()} == {k: v.shape for k, v in expected.items()}


def test_like_takes_scale_and_patch_of_table_2_and_checks_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = read_ldm(saved(tmp_path / "a.ckpt"))
    monkeypatch.setitem(NAMED, "kl8", replace(NAMED["kl8"], network=network, image_size=16))
    assert convert([str(tmp_path / "a.ckpt"), str(tmp_path / "saved"), "--like", "kl8"]) == 0
    config = read_tokenizer_file(tmp_path / "saved").tokenizer
    assert (config.patch, config.scale) == (2, NAMED["kl8"].scale)
    message = refused([str(tmp_path / "a.ckpt"), str(tmp_path / "other"), "--like", "kl16"])
    assert "is not of the architecture 'kl16': it is stride 2, 4 channels, widths (32, 64)" in message
    assert not (tmp_path / "other").exists()


def test_convert_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    convert([str(saved(tmp_path / "a.ckpt", VQ)), str(tmp_path / "saved"), "--image-size", "16", "--ids"])
    out = capsys.readouterr().out
    assert "network  stride 2, 3 channels, widths (32, 64), 17 codes; attention in down 1, up 0" in out
    assert "tokens   8 x 8 of 17 ids, images of 16" in out
    convert([str(tmp_path / "a.ckpt"), str(tmp_path / "other"), "--image-size", "16", "--scale", "0.25"])
    assert "tokens   8 x 8 of dim 3, images of 16, scale 0.25" in capsys.readouterr().out
    convert([str(tmp_path / "a.ckpt"), str(tmp_path / "third"), "--image-size", "16"])
    assert "note     no scale is in the file: `continuar tokenizer stats" in capsys.readouterr().out


def test_sample_takes_official_files_of_model_and_autoencoder(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "mar.pth")
    autoencoder = saved(tmp_path / "kl16.ckpt", Sizes(widths=(32,) * 5, latent=16), "model")
    out = tmp_path / "out"
    options = ["--per-class", "1", "--steps", "2", "--diffusion-steps", "2", "--device", "cpu", "--out", str(out)]
    assert continuar(["sample", str(tmp_path / "mar.pth"), "--tokenizer", str(autoencoder), *options]) == 0
    assert len(list(out.glob("0*.png"))) == layout.Sizes().classes
    assert len(json.loads((out / "samples.json").read_text())) == layout.Sizes().classes


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "generates latents of the autoencoder 'kl16'; give it by --tokenizer"),
        (Sizes(widths=(32, 32), latent=16), "gives TokenSpec(grid=(16, 16), dim=16, vocabulary=0); the model takes"),
        (Sizes(widths=(32,) * 5, latent=8), "the model takes TokenSpec(grid=(2, 2), dim=16"),
    ],
)
def test_sample_refuses_an_autoencoder_that_does_not_fit(
    tokenizer: Sizes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(content(), tmp_path / "mar.pth")
    given = [] if tokenizer is None else ["--tokenizer", str(saved(tmp_path / "a.ckpt", tokenizer))]
    assert continuar(["sample", str(tmp_path / "mar.pth"), *given, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def without(key: str) -> Any:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in state.items() if k != key}

    return change


def reshaped(key: str, *shape: int) -> Any:
    return lambda state: state | {key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"model_ema.decay": torch.ones(1)}, "unexpected: model_ema.decay"),
        (lambda s: s | {"lossy.weight": torch.ones(1)}, "unexpected: lossy.weight"),
        (without("decoder.up.1.block.1.conv2.bias"), "missing: decoder.up.1.block.1.conv2.bias"),
        (without("post_quant_conv.weight"), "lacks post_quant_conv.weight, which tells its size"),
        (without("encoder.down.0.block.0.conv1.weight"), "has no encoder.down.0"),
        (reshaped("decoder.norm_out.weight", 7), "of another shape: decoder.norm_out.weight (7,) instead of (32,)"),
        (reshaped("encoder.conv_in.weight", 64, 3, 3, 3), "ch_mult begins with 32/64; allowed: 1"),
        (reshaped("encoder.down.0.block.0.conv1.weight", 33, 32, 3, 3), "allowed:"),
        (reshaped("post_quant_conv.weight", 4, 5, 1, 1), "has z_channels 4 and embed_dim 5; allowed: equal"),
        (lambda s: s | {"quant_conv.bias": torch.ones(8, dtype=torch.int64)}, "'quant_conv.bias' is not a plain tensor"),
        (lambda s: s | {"quant_conv.bias": 3}, "'quant_conv.bias' is not a plain tensor"),
        (lambda s: s | {"a\nb": torch.ones(1)}, "is not a plain tensor"),
    ],
)
def test_convert_refuses_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    torch.save({"state_dict": change(random_state(KL))}, tmp_path / "a.ckpt")
    assert message in refused([str(tmp_path / "a.ckpt"), str(tmp_path / "saved")])
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "2"], "--heads is 2, which is not for an autoencoder"),
        (["--weights", "raw"], "--weights is raw, which is not for an autoencoder"),
        (["--overwrite"], "--overwrite is for a DST ending in .pth or .ckpt"),
        (["--like", "kl-8"], "unknown tokenizer 'kl-8'"),
        (["--ids"], "has no codebook, so it gives no ids"),
        (["--image-size", "17"], "image size 17 is not divisible by stride x patch = 2 x 1"),
        (["--scale", "-1"], "tokenizer.scale is -1.0"),
    ],
)
def test_convert_refuses_options(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused([str(saved(tmp_path / "a.ckpt")), str(tmp_path / "saved"), *options])
    assert not (tmp_path / "saved").exists()


def test_convert_refuses_destinations(tmp_path: Path) -> None:
    source = str(saved(tmp_path / "a.ckpt"))
    assert "so DST must be a directory" in refused([source, str(tmp_path / "x.pth")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert "exists and is not a saved tokenizer" in refused([source, str(tmp_path / "full")])
    assert convert([source, str(tmp_path / "saved")]) == 0
    assert convert([source, str(tmp_path / "saved")]) == 0
    assert f"{source} exists; --overwrite replaces it" in refused([str(tmp_path / "saved"), source])
    assert "is not a saved tokenizer" in refused([str(tmp_path / "full"), str(tmp_path / "b.ckpt")])
    assert "--patch is 2, which is not for a DST" in refused([str(tmp_path / "saved"), str(tmp_path / "b.ckpt"), "--patch", "2"])
    assert convert([str(tmp_path / "saved"), source, "--overwrite"]) == 0
    assert read_tensors(tmp_path / "saved" / "tokenizer.safetensors").keys() == read_ldm(Path(source))[1].keys()


def test_convert_refuses_networks_that_the_layout_has_no_place_for(tmp_path: Path) -> None:
    for network, message in ((SMALL_GROUPS, "network.norm_num_groups is 2"), (TINY, "is of kind 'tiny'")):
        config = VAEConfig(network=network, image_size=8)
        save_tokenizer(config, config.build().state_dict(), tmp_path / network.kind)
        assert message in refused([str(tmp_path / network.kind), str(tmp_path / "b.ckpt")])
