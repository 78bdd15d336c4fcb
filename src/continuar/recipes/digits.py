"""Handwritten digits on a CPU."""

from continuar.backbones import MAEConfig
from continuar.generation.plan import SamplingOptions
from continuar.heads import DiffusionHeadConfig, DiffusionOptions
from continuar.tokenizers import PixelConfig
from continuar.training.config import DataConfig, EMAConfig, LoopConfig, OptimConfig, Run


def digits() -> Run:
    """MAR on scikit-learn's 8x8 handwritten digits (1,797 images), 16 tokens of 2x2 pixels, on a CPU.

    continuar train digits
    """
    return Run(
        data=DataConfig(path="digits", classes=10),
        tokenizer=PixelConfig(image_size=8, patch=2, channels=1),
        backbone=MAEConfig(width=96, encoder_depth=2, heads=4, decoder_depth=2, buffer=4, attention_dropout=0.0, dropout=0.0),
        head=DiffusionHeadConfig(width=128, depth=3, prediction="velocity"),
        optim=OptimConfig(lr=2e-3, warmup_images=6_400, decay="linear", decay_images=50_000),
        ema=EMAConfig(decay=0.998),
        train=LoopConfig(images=75_000, batch_size=64, log_images=6_400, sample_images=75_000, save_images=75_000),
        sampling=SamplingOptions(steps=16, guidance=2.0, head=DiffusionOptions(diffusion_steps=50)),
    )
