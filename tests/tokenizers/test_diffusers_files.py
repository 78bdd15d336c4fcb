"""Directories and repositories of diffusers as tokenizers: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from continuar.errors import UserError
from continuar.tokenizers.diffusers_files import load_diffusers
from continuar.tokenizers.networks import NetworkConfig

from .networks import CONSISTENCY, DC, KL, NETWORKS, VQ, images

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(network: NetworkConfig, path: Path, **config: Any) -> Any:
    """A diffusers directory as diffusers writes it, with some entries of its config changed; the model itself."""
    torch.manual_seed(0)
    model: Any = network.build().eval()
    model.save_pretrained(path)
    change(path, **config)
    return model


def change(path: Path, **entries: Any) -> None:
    file = path / "config.json"
    values = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_directory_written_by_diffusers_is_a_tokenizer(network: NetworkConfig, tmp_path: Path) -> None:
    model = saved(network, tmp_path / "vae", scaling_factor=0.5)
    tokenizer = load_diffusers(tmp_path / "vae", image_size=8, patch=2)
    assert (tokenizer.config.scale, tokenizer.config.patch) == (0.5, 2)
    with torch.no_grad():
        encoded = model.encode(images(), return_dict=False)[0]
    torch.testing.assert_close(tokenizer.encode(images()), getattr(encoded, "parameters", encoded))


def test_shift_and_scale_come_from_its_config(tmp_path: Path) -> None:
    saved(KL, tmp_path, scaling_factor=0.3611, shift_factor=0.1159)
    config = load_diffusers(tmp_path, image_size=8).config
    assert (config.scale, config.shift) == (0.3611, 0.1159)
    assert load_diffusers(tmp_path, image_size=8, scale=2.0).config.scale == 2.0
    change(tmp_path, scaling_factor=...)
    assert load_diffusers(tmp_path, image_size=8).config.scale == 0


def test_a_vq_model_gives_ids_or_vectors(tmp_path: Path) -> None:
    model = saved(VQ, tmp_path)
    ids = load_diffusers(tmp_path, image_size=8, ids=True)
    with torch.no_grad():
        expected = model.quantize(model.encode(images()).latents)[2][2].view(2, 16)
    assert torch.equal(ids.encode(images()), expected)
    assert ids.spec.vocabulary == 11
    assert load_diffusers(tmp_path, image_size=8).spec.dim == 2


def test_a_pipelines_directory_is_entered_by_its_vae(tmp_path: Path) -> None:
    saved(KL, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_diffusers(tmp_path, image_size=8).spec.dim == 3


def test_names_of_older_attention_layers_are_understood(tmp_path: Path) -> None:
    model = saved(KL, tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / WEIGHTS)
    for new, name in old.items():
        tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
    assert any(".proj_attn." in k for k in tensors)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with torch.no_grad():
        expected = model.encode(images()).latent_dist.parameters
    torch.testing.assert_close(load_diffusers(tmp_path, image_size=8).encode(images()), expected)


def test_one_name_for_all_stages_is_spread_over_them(tmp_path: Path) -> None:
    model = saved(DC, tmp_path, decoder_norm_types="rms_norm", decoder_act_fns="silu")
    tokenizer = load_diffusers(tmp_path, image_size=8)
    assert tokenizer.config.network.options["decoder_norm_types"] == "rms_norm"
    with torch.no_grad():
        latents = model.encode(images(), return_dict=False)[0]
        torch.testing.assert_close(tokenizer.reconstruct(latents), model.decode(latents, return_dict=False)[0].clamp(-1, 1))


def test_half_precision_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
    model = saved(KL, tmp_path)
    model.half().save_pretrained(tmp_path)
    tokenizer = load_diffusers(tmp_path, image_size=8)
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}


def test_a_repository_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--vae"
    saved(CONSISTENCY, repository / "snapshots" / commit / "inner")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_diffusers("someone/vae/inner", image_size=8).spec.dim == 4
    with pytest.raises(UserError, match="someone/other cannot be read: ") as error:
        load_diffusers("someone/other")
    assert "\n" not in str(error.value)


def drop_one(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["quant_conv.bias"]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def add_one(path: Path) -> None:
    save_file(load_file(path / WEIGHTS) | {"more.weight": torch.ones(1)}, path / WEIGHTS, {"format": "pt"})


def pickle_it(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "diffusion_pytorch_model.bin")
    (path / WEIGHTS).unlink()


def truncate(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "does not exist; allowed: a directory of an autoencoder, or a hub id owner/name"),
        (lambda p: (p / "config.json").unlink(), "is not an autoencoder of diffusers: it has no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "config.json is not the config of an autoencoder"),
        (lambda p: change(p, _class_name="UNet2DModel"), "unknown autoencoder class in"),
        (lambda p: change(p, latent_channels="3"), "latent_channels is '3'; int is expected"),
        (lambda p: change(p, depth=3), "'depth'"),
        (lambda p: change(p, scaling_factor="big"), "is 'big'; allowed: a number"),
        (lambda p: change(p, latents_mean=[0.0]), "has latents_mean per channel"),
        (lambda p: change(p, block_out_channels=[4, 16]), "does not fit its config: Error(s) in loading state_dict"),
        (lambda p: (p / WEIGHTS).unlink(), "has no weights; allowed: safetensors"),
        (pickle_it, "has pickled weights (diffusion_pytorch_model.bin), which are not read; allowed: safetensors"),
        (truncate, "diffusion_pytorch_model.safetensors is truncated or damaged"),
        (drop_one, "does not fit its config: missing quant_conv.bias"),
        (add_one, "does not fit its config: unexpected more.weight"),
    ],
)
def test_load_refuses_in_one_line(harm: Any, message: str, tmp_path: Path) -> None:
    saved(KL, tmp_path / "vae")
    harm(tmp_path / "vae")
    with pytest.raises(UserError) as error:
        load_diffusers(tmp_path / "vae", image_size=8)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_load_refuses_what_ids_cannot_have(tmp_path: Path) -> None:
    saved(KL, tmp_path / "kl")
    saved(VQ, tmp_path / "vq")
    with pytest.raises(UserError, match="is an AutoencoderKL, which has no ids; allowed: VQModel"):
        load_diffusers(tmp_path / "kl", image_size=8, ids=True)
    with pytest.raises(UserError, match="patch 2, scale None with ids; allowed: patch 1"):
        load_diffusers(tmp_path / "vq", image_size=8, patch=2, ids=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; allowed: a directory or a hub id"):
        load_diffusers(tmp_path / "file")
