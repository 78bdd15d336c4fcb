"""Autoencoders as tokenizers: every network, every class of the closed table, at tiny sizes."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from continuar.config import from_json, rename_old_fields, to_json
from continuar.errors import UserError
from continuar.tokenizers import TokenizerConfig, VAEConfig, VQConfig
from continuar.tokenizers.networks import KLNetwork, NetworkConfig, TinyNetwork, VQNetwork, diffusers_class
from continuar.tokenizers.pixel import patchify
from continuar.tokenizers.vae import NAMED, LatentConfig, named_tokenizer

from .networks import CONSISTENCY, KL, NETWORKS, TINY, VQ, images, shaken

every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


@pytest.mark.parametrize("network", [KLNetwork, VQNetwork])
def test_defaults_are_those_of_diffusers(network: Any) -> None:
    signature = inspect.signature(diffusers_class(network.class_name).__init__).parameters
    for field in fields(network):
        if field.name != "kind":
            assert field.default == signature[field.name].default, field.name


@every_network
@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_have_the_shape_that_the_config_promises(network: NetworkConfig, patch: int) -> None:
    config = VAEConfig(network=network, image_size=8, patch=patch, scale=0.5, shift=0.1)
    tokenizer = shaken(config.build())
    latents = tokenizer.encode(images())
    assert latents.shape == (2, network.channels * (2 if network.has_variance else 1), 4, 4)
    tokens = tokenizer.tokenize(latents)
    assert tokens.shape == (2, config.spec.seq_len, config.spec.dim)
    assert (config.spec.grid, config.spec.dim) == ((4 // patch, 4 // patch), network.channels * patch**2)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (2, 3, 8, 8)
    assert decoded.abs().max() <= 1
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert not tokenizer.training


@every_network
def test_config_survives_json_and_state_rebuilds_the_tokenizer(network: NetworkConfig) -> None:
    config = VAEConfig(network=network, image_size=8, scale=2.0)
    again = from_json(TokenizerConfig, to_json(config))
    assert again == config
    first, second = shaken(config.build()), again.build()
    second.load_state_dict(first.state_dict())
    latents = first.encode(images())
    assert torch.equal(latents, second.encode(images()))
    tokens = torch.randn(1, *(config.spec.seq_len, config.spec.dim))
    assert torch.equal(first.decode(tokens), second.decode(tokens))


def test_tokens_are_drawn_from_the_posterior_then_shifted_scaled_and_merged() -> None:
    tokenizer = VAEConfig(network=KL, image_size=8, patch=2, scale=4.0, shift=-0.5).build()
    mean, log_variance = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.manual_seed(3)
    tokens = tokenizer.tokenize(torch.cat((mean, log_variance), 1).bfloat16())
    torch.manual_seed(3)
    drawn = mean.bfloat16().float() + (log_variance.bfloat16().float() / 2).exp() * torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(tokens, patchify((drawn + 0.5) * 4, 2))
    assert tokens.dtype is torch.float32


def test_many_draws_have_the_posteriors_mean_and_deviation() -> None:
    tokenizer = VAEConfig(network=KL, image_size=8, scale=0.5, shift=1.0).build()
    moments = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0]).log_().view(1, 6, 1, 1).expand(4000, 6, 4, 4)
    torch.manual_seed(0)
    tokens = tokenizer.tokenize(moments)
    log3 = torch.tensor(3.0).log().item()
    assert tokens.mean().item() == pytest.approx((log3 - 1) * 0.5, abs=5e-3)
    assert tokens.std().item() == pytest.approx(0.5, rel=1e-2)


def test_log_variances_are_clamped() -> None:
    tokenizer = VAEConfig(network=KL, image_size=8, scale=1.0).build()
    moments = torch.cat((torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), -1e4)), 1)
    torch.testing.assert_close(tokenizer.tokenize(moments), torch.ones(1, 16, 3), atol=1e-5, rtol=0)
    assert torch.isfinite(tokenizer.tokenize(moments * -1)).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_latents_of_tokens_are_the_latents_that_went_in(patch: int) -> None:
    tokenizer = VAEConfig(network=TINY, image_size=8, patch=patch, scale=0.3, shift=0.7).build()
    latents = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(tokenizer.latents(tokenizer.tokenize(latents)), latents)


def test_decoding_does_not_depend_on_the_batch_even_where_the_decoder_draws_noise() -> None:
    tokenizer = shaken(VAEConfig(network=CONSISTENCY, image_size=8, scale=1.0).build())
    tokens = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    together = tokenizer.decode(tokens)
    torch.manual_seed(2)
    alone = torch.cat([tokenizer.decode(t[None]) for t in tokens.flip(0)]).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_ids_are_those_of_the_nearest_codes() -> None:
    tokenizer = shaken(VQConfig(network=VQ, image_size=8).build())
    ids = tokenizer.encode(images(5))
    assert (ids.shape, ids.dtype) == ((5, 16), torch.int64)
    x = tokenizer.network.encode(images(5)).latents.double().permute(0, 2, 3, 1).reshape(-1, 1, 2)
    distance = (x - tokenizer.codebook.double()).square().sum(-1)
    assert torch.equal(ids.flatten(), distance.argmin(1))
    assert len(ids.unique()) > 1
    assert torch.equal(tokenizer.tokenize(ids.to(torch.int32)), ids)


def test_ids_and_vectors_before_quantisation_decode_to_the_same_image() -> None:
    ids = shaken(VQConfig(network=VQ, image_size=8).build())
    vectors = VAEConfig(network=VQ, image_size=8, scale=0.25).build()
    vectors.load_state_dict(ids.state_dict())
    one = ids.decode(ids.encode(images()))
    torch.testing.assert_close(one, vectors.decode(vectors.tokenize(vectors.encode(images()))))
    assert VQConfig(network=VQ, image_size=8).spec.vocabulary == 11


def test_named_tokenizers_are_table_2() -> None:
    assert {name: (config.spec.grid, config.spec.dim) for name, config in NAMED.items()} == {
        "vq16": ((16, 16), 8),
        "kl16": ((16, 16), 16),
        "kl8": ((16, 16), 16),
        "consistency": ((16, 16), 16),
        "kl16_mar": ((16, 16), 16),
    }
    assert named_tokenizer("kl16_mar").scale == LatentConfig().scale
    with torch.device("meta"):
        built = {name: config.build() for name, config in NAMED.items()}
    counts = {name: sum(p.numel() for p in tokenizer.parameters()) for name, tokenizer in built.items()}
    # Stable Diffusion's autoencoder, of kl8's architecture, is known to have 83,653,863 parameters.
    assert counts["kl8"] == 83_653_863
    assert counts["kl16"] - counts["kl16_mar"] == 3 * (4 * 512 * 512 + 6 * 512)
    with pytest.raises(UserError, match="unknown tokenizer 'kl-16'; did you mean kl16"):
        named_tokenizer("kl-16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image size 9 is not divisible by stride x patch = 2 x 1 = 2; nearest allowed: 8 or 10"),
        ({"image_size": 6, "patch": 2}, "image size 6 is not divisible by stride x patch = 2 x 2 = 4; nearest allowed: 4 or 8"),
        ({"image_size": 0}, "nearest allowed: 2 or 2"),
        ({"patch": 0}, "tokenizer.patch is 0; allowed: 1 or more"),
        ({"scale": -1.0}, "tokenizer.scale is -1.0; allowed: above 0, or 0 if not measured yet"),
        ({"scale": float("nan")}, "tokenizer.scale is nan"),
        ({"shift": float("inf")}, "tokenizer.shift is inf"),
    ],
)
def test_vae_refuses(change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        replace(VAEConfig(network=KL, image_size=8), **change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": ()}, "network widths are (); allowed: one or more"),
        ({"up_block_types": ("UpDecoderBlock2D",)}, "network.up_block_types has 1 entries; allowed: 2, one per width"),
        ({"block_out_channels": (4, 9)}, "network width [9] is not divisible by norm_num_groups 2"),
        ({"norm_num_groups": 0}, "network.norm_num_groups is 0; allowed: 1 or more"),
        ({"latent_channels": 0}, "network.latent_channels is 0; allowed: 1 or more"),
        ({"layers_per_block": 0}, "network.layers_per_block is 0; allowed: 1 or more"),
    ],
)
def test_network_refuses(change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        replace(KL, **change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": ...}, "network.latent_channels is None; allowed: 1 or more"),
        ({"latent_channels": "3"}, "network.latent_channels is '3'; allowed: 1 or more"),
        ({"encoder_block_out_channels": []}, "network.encoder_block_out_channels is []; allowed: a list of widths"),
        ({"in_channels": 1}, "network.in_channels is 1; allowed: 3"),
    ],
)
def test_network_kept_as_diffusers_writes_it_refuses(change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        TinyNetwork({k: v for k, v in (TINY.options | change).items() if v is not ...})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_chanels": 4}, "unknown argument of AutoencoderTiny 'latent_chanels'; did you mean latent_channels"),
        ({"act_fn": "step"}, "AutoencoderTiny does not accept its arguments: "),
        ({"num_encoder_blocks": 3}, "AutoencoderTiny does not accept its arguments: "),
    ],
)
def test_diffusers_refuses_when_the_network_is_built(change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        TinyNetwork(TINY.options | change).build()
    assert message in str(error.value)


def test_networks_saved_with_a_field_per_argument_are_read() -> None:
    config = VAEConfig(network=TINY, image_size=8)
    new = to_json(config)
    old = new | {"network": {"kind": "tiny", **new["network"]["options"]}}
    assert from_json(TokenizerConfig, rename_old_fields(old)) == config
    assert rename_old_fields(new) == new


def test_a_tokenizer_without_a_scale_encodes_but_gives_no_tokens() -> None:
    tokenizer = VAEConfig(network=KL, image_size=8).build()
    latents = tokenizer.encode(images())
    for call in (lambda: tokenizer.tokenize(latents), lambda: tokenizer.decode(torch.zeros(1, 16, 3))):
        with pytest.raises(UserError, match=r"no scale yet: `continuar tokenizer stats"):
            call()


@pytest.mark.parametrize("config", [VAEConfig(network=KL, image_size=8), VQConfig(network=VQ, image_size=8)])
def test_random_weights_are_not_trained_on(config: TokenizerConfig) -> None:
    with pytest.raises(UserError, match="the autoencoder has random weights; `continuar cache"):
        config.build().fit(images())


@pytest.mark.parametrize("config", [VAEConfig(network=KL, image_size=8), VQConfig(network=VQ, image_size=8)])
def test_images_of_another_size_are_refused(config: TokenizerConfig) -> None:
    with pytest.raises(UserError, match=r"images are \(2, 3, 10, 10\); allowed: \[B, 3, 8, 8\]"):
        config.build().encode(images(size=10))


def test_ids_outside_the_codebook_are_refused() -> None:
    with pytest.raises(UserError, match="ids run from 0 to 11; allowed: 0 to 10"):
        VQConfig(network=VQ, image_size=8).build().decode(torch.tensor([[0] * 15 + [11]]))
