"""The tokenizers of the paper's Table 2 (Li et al., NeurIPS 2024), for images of 256 x 256, by name.

| name | what | rFID there |
|---|---|---|
| vq16 | LDM's vq-f16, vectors before quantisation | 5.87 |
| kl16 | LDM's kl-f16 | 1.43 |
| kl8 | LDM's kl-f8, 2 x 2 latents merged | 1.20 |
| consistency | the consistency decoder on latents of kl8, 2 x 2 merged | 1.30 |
| kl16_mar | the paper's own KL-16: no attention in the decoder's upsampling path | 1.22 |

They are architectures; weights come from files. Where no scale is known it is 0, to be measured.
"""

from __future__ import annotations

from dataclasses import replace

from continuar.errors import unknown_name
from continuar.tokenizers.diffusers_vae import VAEConfig
from continuar.tokenizers.latent import LatentConfig
from continuar.tokenizers.networks import ConsistencyNetwork, DownBlock, KLNetwork, UpBlock, VQNetwork

_DOWN: tuple[DownBlock, ...] = ("DownEncoderBlock2D",) * 4
_UP: tuple[UpBlock, ...] = ("UpDecoderBlock2D",) * 4
_F16 = (128, 128, 256, 256, 512)

KL16_LDM = KLNetwork(
    latent_channels=16,
    down_block_types=(*_DOWN, "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", *_UP),
    block_out_channels=_F16,
    layers_per_block=2,
)
KL16_MAR = replace(KL16_LDM, up_block_types=("UpDecoderBlock2D", *_UP))
KL8_LDM = KLNetwork(
    latent_channels=4,
    down_block_types=_DOWN,
    up_block_types=_UP,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
)
VQ16_LDM = VQNetwork(
    latent_channels=8,
    down_block_types=KL16_LDM.down_block_types,
    up_block_types=KL16_LDM.up_block_types,
    block_out_channels=_F16,
    layers_per_block=2,
    num_vq_embeddings=16384,
    vq_embed_dim=8,
)
# What multiplies the latents of Stable Diffusion's autoencoder, of this architecture (Rombach et al. 2022).
_KL8_SCALE = ConsistencyNetwork.scaling_factor

NAMED: dict[str, VAEConfig] = {
    "vq16": VAEConfig(network=VQ16_LDM),
    "kl16": VAEConfig(network=KL16_LDM),
    "kl8": VAEConfig(network=KL8_LDM, patch=2, scale=_KL8_SCALE),
    "consistency": VAEConfig(network=ConsistencyNetwork(), patch=2, scale=_KL8_SCALE),
    "kl16_mar": VAEConfig(network=KL16_MAR, scale=LatentConfig.scale),
}


def named_tokenizer(name: str) -> VAEConfig:
    """The config of that name.

    Raises:
        UserError: unknown; the nearest names are suggested.
    """
    if name not in NAMED:
        raise unknown_name("tokenizer", name, NAMED)
    return NAMED[name]
