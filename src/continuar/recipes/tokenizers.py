"""Recipes of tokenizers. All need ``--data.path`` and ``--loss.perceptual-weights FILE`` (or ``--loss.perceptual off``).

PSNR is of reconstructions of images outside the training set (docs/results.md); a share of training images is given where a run
was stopped early. The two recipes for ImageNet have not been trained here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from continuar.tokenizers import VAEConfig, VQConfig
from continuar.tokenizers.networks import KLNetwork, VQNetwork
from continuar.tokenizers.vae import KL16_MAR, VQ16_LDM
from continuar.training.config import (
    CodebookLearning,
    DiscriminatorConfig,
    LossConfig,
    OptimConfig,
    TokenizerLoopConfig,
    TokenizerRun,
)

N = TypeVar("N", KLNetwork, VQNetwork)

# Momentum 0.5 as in adversarial training since Radford et al. 2016.
_ADAM = OptimConfig(lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0, clip=1.0, decay="cosine", final_lr=0.05)


def _stride4(network: type[N], **more: Any) -> N:
    return network(
        latent_channels=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        **more,
    )


def kl_cifar10() -> TokenizerRun:
    """KL tokenizer of stride 4 for CIFAR-10: 8 x 8 tokens of 8 channels, on one GPU.

    continuar tokenizer train kl_cifar10 --data.path DIR_OR_PARQUET --loss.perceptual-weights squeezenet1_1.safetensors

    PSNR 33.0 dB, in 474 s on one H200.
    """
    return TokenizerRun(
        tokenizer=VAEConfig(network=_stride4(KLNetwork), image_size=32),
        loss=LossConfig(perceptual="squeezenet", perceptual_weight=0.3, kl_weight=1e-4),
        discriminator=DiscriminatorConfig(weight=0.3, start_images=2_000_000, layers=2),
        optim=replace(_ADAM, lr=4e-4, warmup_images=100_000),
        train=TokenizerLoopConfig(images=6_000_000, batch_size=256, log_images=50_000, sample_images=500_000, save_images=500_000),
    )


def vq_cifar10() -> TokenizerRun:
    """VQ tokenizer of stride 4 for CIFAR-10: 8 x 8 ids of a codebook of 1,024, on one GPU.

    continuar tokenizer train vq_cifar10 --data.path DIR_OR_PARQUET --loss.perceptual-weights squeezenet1_1.safetensors

    PSNR 26.1 dB, in 476 s on one H200.
    """
    network = _stride4(VQNetwork, num_vq_embeddings=1024, vq_embed_dim=8)
    return replace(kl_cifar10(), tokenizer=VQConfig(network=network, image_size=32), codebook=CodebookLearning(update="ema"))


def kl16_imagenette128() -> TokenizerRun:
    """KL-16 for Imagenette at 128 x 128: 8 x 8 tokens of 16 channels, half the paper's width, on one GPU.

    continuar tokenizer train kl16_imagenette128 --data.path DIR_OR_PARQUET --loss.perceptual-weights squeezenet1_1.safetensors

    PSNR 20.8 dB after 864,384 of its 2.5 million images.
    """
    return TokenizerRun(
        tokenizer=VAEConfig(network=replace(KL16_MAR, block_out_channels=(64, 64, 128, 128, 256)), image_size=128),
        loss=LossConfig(perceptual="squeezenet", kl_weight=1e-6),
        discriminator=DiscriminatorConfig(weight=0.5, start_images=800_000),
        optim=replace(_ADAM, warmup_images=50_000),
        train=TokenizerLoopConfig(images=2_500_000, batch_size=64, log_images=20_000, sample_images=250_000, save_images=250_000),
    )


def vq16_imagenette128() -> TokenizerRun:
    """VQ-16 for Imagenette at 128 x 128: 8 x 8 ids of a codebook of 4,096, half of LDM's width, on one GPU.

    continuar tokenizer train vq16_imagenette128 --data.path DIR_OR_PARQUET --loss.perceptual-weights squeezenet1_1.safetensors

    PSNR 18.6 dB after 700,032 of its 2.5 million images.
    """
    network = replace(VQ16_LDM, block_out_channels=(64, 64, 128, 128, 256), num_vq_embeddings=4096)
    return replace(kl16_imagenette128(), tokenizer=VQConfig(network=network, image_size=128))


def kl16_imagenet256() -> TokenizerRun:
    """KL-16 of the paper's architecture for ImageNet at 256 x 256: 16 x 16 tokens of 16 channels. Paper: rFID 1.22.

    continuar tokenizer train kl16_imagenet256 --data.path DIR_OR_TARS --loss.perceptual-weights lpips_vgg.safetensors

    50 passes with LDM's loss weights. torchrun spreads it over any number of GPUs that divides the batch of 32.
    """
    return TokenizerRun(
        tokenizer=VAEConfig(network=KL16_MAR, image_size=256),
        loss=LossConfig(perceptual="lpips", kl_weight=1e-6),
        discriminator=DiscriminatorConfig(weight=0.5, start_images=6_000_000),
        optim=replace(_ADAM, lr=1e-4, warmup_images=100_000),
        train=TokenizerLoopConfig(
            images=50 * 1_281_167, batch_size=32, log_images=20_000, sample_images=500_000, save_images=500_000
        ),
    )


def vq16_imagenet256() -> TokenizerRun:
    """VQ-16 of LDM's architecture for ImageNet at 256 x 256: 16 x 16 ids of a codebook of 16,384.

    continuar tokenizer train vq16_imagenet256 --data.path DIR_OR_TARS --loss.perceptual-weights lpips_vgg.safetensors
    """
    return replace(kl16_imagenet256(), tokenizer=VQConfig(network=VQ16_LDM, image_size=256))


TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerRun]] = {
    recipe.__name__: recipe
    for recipe in (kl_cifar10, vq_cifar10, kl16_imagenette128, vq16_imagenette128, kl16_imagenet256, vq16_imagenet256)
}
