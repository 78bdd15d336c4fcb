"""Any folder of class folders."""

from continuar.backbones import MAEConfig
from continuar.generation.plan import SamplingOptions
from continuar.heads import DiffusionHeadConfig
from continuar.tokenizers import PixelConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig, Run


def folder() -> Run:
    """MAR on any folder of class folders (ROOT/CLASS/IMAGE), pixel patches as tokens.

    continuar train folder --data.path DIR --tokenizer.image-size 64 --tokenizer.patch 4

    Tokens per image are (image_size / patch)^2; more than 256 get slow, and patches over 8x8 pixels lose detail.
    """
    return Run(
        data=DataConfig(flip=True),
        tokenizer=PixelConfig(image_size=32, patch=4),
        backbone=MAEConfig(width=384, encoder_depth=6, heads=6, decoder_depth=6, buffer=16),
        head=DiffusionHeadConfig(width=512, depth=3, prediction="velocity"),
        optim=OptimConfig(lr=4e-4, warmup_images=50_000),
        ema=EMAConfig(decay=0.9995),
        train=LoopConfig(images=5_000_000, batch_size=128, log_images=10_000, sample_images=250_000, save_images=250_000),
        sampling=SamplingOptions(steps=32, guidance=2.5, guidance_schedule="constant"),
    )


def folder_gpu() -> Run:
    """MAR on any small data set of class folders or Parquet at 64x64, 256 tokens of 4x4 pixels, on one GPU.

    continuar train folder_gpu --data.path DIR_OR_PARQUET

    4x4 pixel patches are the paper's own for ImageNet 64x64 (Section 5). Mask counts are multiples of 16, so that compiling is
    short.
    """
    return Run(
        data=DataConfig(flip=True),
        tokenizer=PixelConfig(image_size=64, patch=4),
        backbone=MAEConfig(width=384, encoder_depth=6, heads=6, decoder_depth=6, buffer=32, mask_granularity=16),
        head=DiffusionHeadConfig(width=512, depth=3, timesteps_per_token=2, prediction="velocity"),
        optim=OptimConfig(lr=6e-4, warmup_images=100_000, decay="linear"),
        ema=EMAConfig(decay=0.9995),
        train=LoopConfig(
            images=10_000_000,
            batch_size=256,
            log_images=25_000,
            sample_images=2_000_000,
            save_images=500_000,
            engine="compile-graphs",
        ),
        sampling=SamplingOptions(steps=64, guidance=2.5, guidance_schedule="constant"),
    )
