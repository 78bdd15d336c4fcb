"""Autoencoders of a few thousand parameters, one of each kind."""

from __future__ import annotations

import torch

from continuar.tokenizers import Tokenizer
from continuar.tokenizers.networks import ConsistencyNetwork, DCNetwork, KLNetwork, NetworkConfig, TinyNetwork, VQNetwork

KL = KLNetwork(
    latent_channels=3,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    norm_num_groups=2,
)
VQ = VQNetwork(
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    norm_num_groups=2,
    num_vq_embeddings=11,
    vq_embed_dim=2,
)
TINY = TinyNetwork(
    {
        "latent_channels": 4,
        "encoder_block_out_channels": (64, 64),
        "decoder_block_out_channels": (64, 64),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
)
DC = DCNetwork(
    {
        "latent_channels": 8,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "decoder_norm_types": ("rms_norm",) * 2,
        "decoder_act_fns": ("silu",) * 2,
    }
)
CONSISTENCY = ConsistencyNetwork(
    {
        "latent_channels": 4,
        "encoder_block_out_channels": (4, 8),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 2,
        "decoder_block_out_channels": (8, 8),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 4,
    }
)
NETWORKS: dict[str, NetworkConfig] = {"kl": KL, "vq": VQ, "tiny": TINY, "dc": DC, "consistency": CONSISTENCY}


def images(count: int = 2, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Noise in [-1, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shaken(tokenizer: Tokenizer, seed: int = 0) -> Tokenizer:
    """The same random weights for the same seed, norms and codebooks included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            x = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel()
            around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(around + (x / fan_in**0.5 if parameter.ndim > 1 else 0.1 * x))
    return tokenizer
