"""The paper's ImageNet 256x256 models (Li et al., NeurIPS 2024, Section 4, Tables 3 and 4, Appendix B).

Tokens are the latents of KL-16: 16 x 16 of 16 channels, times 0.2325. The FIDs are the paper's, of 50,000 samples; none of these
models has been trained here. ``--dry-run`` sizes one up without any data. Training reads a cache of latents:

    continuar convert kl16.ckpt kl16 --like kl16_mar         the paper's autoencoder with its scale
    continuar cache IMAGENET kl16 latents/imagenet256        every image and its mirror image, once
    continuar train mar_l_imagenet256 --data.path latents/imagenet256

Another autoencoder of stride 16 and 16 channels goes the same way (`continuar tokenizer train kl16_imagenet256`).
"""

from __future__ import annotations

import dataclasses

from continuar.backbones import MAEConfig
from continuar.generation.plan import SamplingOptions
from continuar.heads import DiffusionHeadConfig
from continuar.tokenizers import LatentConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig, Run

IMAGENET_IMAGES = 1_281_167
BATCH = 2048


def _imagenet256(backbone: MAEConfig, head: DiffusionHeadConfig, guidance: float) -> Run:
    """What all sizes share: 800 epochs at batch 2048, lr 1e-4 per 256 images, constant after 100 epochs of warm-up."""
    return Run(
        data=DataConfig(classes=1000, flip=True),
        tokenizer=LatentConfig(),
        backbone=backbone,
        head=head,
        optim=OptimConfig(
            lr=1e-4 * BATCH / 256,
            warmup_images=100 * IMAGENET_IMAGES,
            betas=(0.9, 0.95),
            weight_decay=0.02,
            clip=3.0,
        ),
        ema=EMAConfig(decay=0.9999),
        train=LoopConfig(
            images=800 * IMAGENET_IMAGES,
            batch_size=BATCH,
            label_dropout=0.1,
            log_images=100 * BATCH,
            sample_images=5 * IMAGENET_IMAGES,
            save_images=5 * IMAGENET_IMAGES,
        ),
        sampling=SamplingOptions(steps=256, guidance=guidance, guidance_schedule="linear"),
    )


def mar_b_imagenet256() -> Run:
    """MAR-B, 208M parameters: 768 wide, 12 + 12 blocks, head 6 x 1024. Paper: FID 3.48, guided 2.31.

    continuar train mar_b_imagenet256 --data.path latents/imagenet256
    """
    backbone = MAEConfig(width=768, encoder_depth=12, heads=12, decoder_depth=12)
    return _imagenet256(backbone, DiffusionHeadConfig(width=1024, depth=6), guidance=2.9)


def mar_l_imagenet256() -> Run:
    """MAR-L, 479M parameters: 1024 wide, 16 + 16 blocks, head 8 x 1280. Paper: FID 2.60, guided 1.78.

    continuar train mar_l_imagenet256 --data.path latents/imagenet256
    """
    backbone = MAEConfig(width=1024, encoder_depth=16, heads=16, decoder_depth=16)
    return _imagenet256(backbone, DiffusionHeadConfig(width=1280, depth=8), guidance=3.0)


def mar_h_imagenet256() -> Run:
    """MAR-H, 943M parameters: 1280 wide, 20 + 20 blocks, head 12 x 1536. Paper: FID 2.35, guided 1.55.

    continuar train mar_h_imagenet256 --data.path latents/imagenet256
    """
    backbone = MAEConfig(width=1280, encoder_depth=20, heads=16, decoder_depth=20)
    return _imagenet256(backbone, DiffusionHeadConfig(width=1536, depth=12), guidance=3.2)


def mar_l_imagenet256_ablation() -> Run:
    """MAR-L with the ablations' head 3 x 1024, 400 epochs (Tables 1 to 3). Paper: FID 3.50, guided 1.98, at 64 steps.

    continuar train mar_l_imagenet256_ablation --data.path latents/imagenet256
    """
    run = mar_l_imagenet256()
    return dataclasses.replace(
        run,
        head=DiffusionHeadConfig(width=1024, depth=3),
        train=dataclasses.replace(run.train, images=400 * IMAGENET_IMAGES),
        sampling=dataclasses.replace(run.sampling, steps=64),
    )
