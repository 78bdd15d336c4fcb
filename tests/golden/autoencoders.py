"""The files `vae_*`: autoencoders in LDM's key layout. Part of `check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from continuar.checkpoints.ldm import network_from_ldm, to_diffusers
from continuar.tokenizers import Tokenizer, VAEConfig, VQConfig
from continuar.tokenizers.networks import VQNetwork

Errors = Iterator[tuple[str, float]]


def check_autoencoder(g: dict[str, Tensor], state: dict[str, Tensor], error: Callable[[Tensor, Tensor], float]) -> Errors:
    """Latents, tokens and images of an autoencoder, through the tokenizers."""
    network = network_from_ldm(state)
    weights = {f"network.{k}": v for k, v in to_diffusers(state, network).items()}

    def loaded(config: VAEConfig | VQConfig) -> Tokenizer:
        tokenizer = config.build()
        tokenizer.load_state_dict(weights)
        return tokenizer

    side = g["image"].shape[-1]
    vectors = loaded(VAEConfig(network=network, image_size=side, patch=2, scale=0.3, shift=0.2))
    latents = vectors.encode(g["image"])
    if not isinstance(network, VQNetwork):
        yield "moments", error(latents, g["moments"])
        yield "mean", error(latents.chunk(2, 1)[0], g["mean"])
        # Without variance a draw is the mean, so tokens must decode to the golden image.
        certain = torch.cat((g["mean"], torch.full_like(g["mean"], -30.0)), 1)
        yield "decoded", error(vectors.decode(vectors.tokenize(certain)), g["decoded"].clamp(-1, 1))
        yield "decoded, unclamped", error(network.decode(vectors.network, g["mean"]), g["decoded"])
        return
    yield "pre_quant", error(latents, g["pre_quant"])
    ids = loaded(VQConfig(network=network, image_size=side))
    yield "indices", error(ids.encode(g["image"]), g["indices"])
    yield "quantized", error(ids.codebook[g["indices"]].permute(0, 2, 1).reshape(g["quantized"].shape), g["quantized"])
    yield "decoded", error(ids.decode(g["indices"]), g["decoded"].clamp(-1, 1))
    yield "decoded, unclamped", error(network.decode_codes(ids.network, g["quantized"]), g["decoded"])
    again = vectors.decode(vectors.tokenize(g["pre_quant"]))
    yield "decoded_from_pre_quant_quantized", error(again, g["decoded_from_pre_quant_quantized"].clamp(-1, 1))
