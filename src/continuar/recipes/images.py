"""Recipes of MAR with the diffusion loss: digits on a CPU, CIFAR-10, folders of images, and the paper's ImageNet models.

The ImageNet models (Li et al., NeurIPS 2024, Section 4, Tables 3 and 4, Appendix B) take the latents of KL-16, 16 x 16 tokens of 16
channels times 0.2325. Their FIDs are the paper's, of 50,000 samples; none of these models has been trained here. ``--dry-run``
prints what they cost, without data. Training reads a cache of latents:

    continuar convert kl16.ckpt kl16 --like kl16_mar         the paper's autoencoder with its scale
    continuar cache IMAGENET kl16 latents/imagenet256        every image and its mirror image, once
    continuar train mar_l_imagenet256 --data.path latents/imagenet256

Another autoencoder of stride 16 and 16 channels is used in the same way (`continuar tokenizer train kl16_imagenet256`).
"""

from __future__ import annotations

from dataclasses import replace

from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.models import MAEConfig
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import LatentConfig, PixelConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig, Run


def digits() -> Run:
    """MAR on scikit-learn's 8x8 handwritten digits (1,797 images), 16 tokens of 2x2 pixels, on a CPU.

    continuar train digits

    0.81 M parameters, 143 s on two cores. 0.993 of 300 samples are read as the digit that was asked for (docs/results.md).
    """
    return Run(
        data=DataConfig(path="digits", classes=10),
        tokenizer=PixelConfig(image_size=8, patch=2, channels=1),
        backbone=MAEConfig(width=96, encoder_depth=2, heads=4, decoder_depth=2, buffer=4, attention_dropout=0.0, dropout=0.0),
        head=DiffusionHeadConfig(width=128, depth=3, prediction="v_prediction"),
        optim=OptimConfig(lr=2e-3, warmup_images=6_400, decay="linear", decay_images=50_000),
        ema=EMAConfig(decay=0.998),
        train=LoopConfig(images=75_000, batch_size=64, log_images=6_400, sample_images=75_000, save_images=75_000),
        sampling=SamplingOptions(steps=16, guidance_scale=2.0, head=DiffusionOptions(diffusion_steps=50)),
    )


def cifar10() -> Run:
    """MAR on CIFAR-10 (32x32), 64 tokens of 4x4 pixels, on one GPU.

    continuar train cifar10 --data.path DIR_OR_PARQUET

    7.86 M parameters. After 34.7 million images, the model that ships: class accuracy 0.906 (docs/results.md).
    """
    return Run(
        data=DataConfig(classes=10, flip=True),
        tokenizer=PixelConfig(image_size=32, patch=4),
        # Training hides 16 to 64 tokens. By the cosine schedule most tokens are generated with less than the paper's 70% hidden:
        # Frechet distance 338 after 2 million images, and 376 with the paper's range (docs/results.md).
        backbone=MAEConfig(width=224, encoder_depth=4, heads=7, decoder_depth=4, buffer=16, mask_ratio_min=0.2, mask_granularity=8),
        head=DiffusionHeadConfig(width=384, depth=3, diffusion_batch_mul=2, prediction="v_prediction"),
        optim=OptimConfig(lr=1e-3, warmup_images=500_000, decay="linear", decay_images=12_000_000),
        ema=EMAConfig(decay=0.9998),
        train=LoopConfig(
            images=30_000_000,
            batch_size=512,
            log_images=100_000,
            sample_images=10_000_000,
            save_images=5_000_000,
            engine="compile-graphs",
        ),
        sampling=SamplingOptions(steps=32, guidance_scale=2.5, guidance_schedule="constant"),
    )


def folder() -> Run:
    """MAR on any folder of class folders (ROOT/CLASS/IMAGE), pixel patches as tokens.

    continuar train folder --data.path DIR --tokenizer.image-size 64 --tokenizer.patch 4

    An image has (image_size / patch)^2 tokens.
    """
    return Run(
        data=DataConfig(flip=True),
        tokenizer=PixelConfig(image_size=32, patch=4),
        backbone=MAEConfig(width=384, encoder_depth=6, heads=6, decoder_depth=6, buffer=16),
        head=DiffusionHeadConfig(width=512, depth=3, prediction="v_prediction"),
        optim=OptimConfig(lr=4e-4, warmup_images=50_000),
        ema=EMAConfig(decay=0.9995),
        train=LoopConfig(images=5_000_000, batch_size=128, log_images=10_000, sample_images=250_000, save_images=250_000),
        sampling=SamplingOptions(steps=32, guidance_scale=2.5, guidance_schedule="constant"),
    )


def folder_gpu() -> Run:
    """MAR on any small data set of class folders or Parquet at 64x64, 256 tokens of 4x4 pixels, on one GPU.

    continuar train folder_gpu --data.path DIR_OR_PARQUET

    4x4 pixel patches are the paper's own for ImageNet 64x64 (Section 5). On Imagenette, 2 million images took five minutes on one
    H200 (docs/results.md).
    """
    run, train = folder(), LoopConfig(images=10_000_000, batch_size=256, engine="compile-graphs")
    return replace(
        run,
        tokenizer=PixelConfig(image_size=64, patch=4),
        # Masked counts are multiples of 16, so that few shapes are compiled.
        backbone=MAEConfig(width=384, encoder_depth=6, heads=6, decoder_depth=6, buffer=32, mask_granularity=16),
        head=DiffusionHeadConfig(width=512, depth=3, diffusion_batch_mul=2, prediction="v_prediction"),
        optim=OptimConfig(lr=6e-4, warmup_images=100_000, decay="linear"),
        train=replace(train, log_images=25_000, sample_images=2_000_000, save_images=500_000),
        sampling=replace(run.sampling, steps=64),
    )


def _imagenet256(width: int, blocks: int, heads: int, head: DiffusionHeadConfig, guidance_scale: float) -> Run:
    """The training of all sizes: 800 epochs at batch 2048, lr 1e-4 per 256 images, constant after 100 epochs of warm-up."""
    epoch, batch = 1_281_167, 2048
    return Run(
        data=DataConfig(classes=1000, flip=True),
        tokenizer=LatentConfig(),
        backbone=MAEConfig(width=width, encoder_depth=blocks, heads=heads, decoder_depth=blocks),
        head=head,
        optim=OptimConfig(lr=1e-4 * batch / 256, warmup_images=100 * epoch, betas=(0.9, 0.95), weight_decay=0.02, clip=3.0),
        ema=EMAConfig(decay=0.9999),
        train=LoopConfig(
            images=800 * epoch,
            batch_size=batch,
            label_dropout=0.1,
            log_images=100 * batch,
            sample_images=5 * epoch,
            save_images=5 * epoch,
        ),
        sampling=SamplingOptions(steps=256, guidance_scale=guidance_scale, guidance_schedule="linear"),
    )


def mar_b_imagenet256() -> Run:
    """MAR-B, 208M parameters: 768 wide, 12 + 12 blocks, head 6 x 1024. Paper: FID 3.48, guided 2.31.

    continuar train mar_b_imagenet256 --data.path latents/imagenet256
    """
    return _imagenet256(768, 12, 12, DiffusionHeadConfig(width=1024, depth=6), guidance_scale=2.9)


def mar_l_imagenet256() -> Run:
    """MAR-L, 479M parameters: 1024 wide, 16 + 16 blocks, head 8 x 1280. Paper: FID 2.60, guided 1.78.

    continuar train mar_l_imagenet256 --data.path latents/imagenet256
    """
    return _imagenet256(1024, 16, 16, DiffusionHeadConfig(width=1280, depth=8), guidance_scale=3.0)


def mar_h_imagenet256() -> Run:
    """MAR-H, 943M parameters: 1280 wide, 20 + 20 blocks, head 12 x 1536. Paper: FID 2.35, guided 1.55.

    continuar train mar_h_imagenet256 --data.path latents/imagenet256
    """
    return _imagenet256(1280, 20, 16, DiffusionHeadConfig(width=1536, depth=12), guidance_scale=3.2)


def mar_l_imagenet256_ablation() -> Run:
    """MAR-L with the ablations' head 3 x 1024, 400 epochs (Tables 1 to 3). Paper: FID 3.50, guided 1.98, at 64 steps.

    continuar train mar_l_imagenet256_ablation --data.path latents/imagenet256
    """
    run = mar_l_imagenet256()
    train, sampling = replace(run.train, images=run.train.images // 2), replace(run.sampling, steps=64)
    return replace(run, head=DiffusionHeadConfig(width=1024, depth=3), train=train, sampling=sampling)
