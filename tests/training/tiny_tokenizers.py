"""Runs of tokenizers that take a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from continuar.tokenizers import VAEConfig, VQConfig
from continuar.training.config import (
    CodebookLearning,
    DiscriminatorConfig,
    ImagesConfig,
    LossConfig,
    OptimConfig,
    TokenizerLoopConfig,
    TokenizerRun,
)
from tests.tokenizers.networks import KL, VQ

NETWORK = replace(KL, down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(8, 8), mid_block_add_attention=False)
CODES = replace(VQ, block_out_channels=(8, 8), mid_block_add_attention=False, num_vq_embeddings=16)
TOKENIZERS = {"kl": VAEConfig(network=NETWORK, image_size=8), "vq": VQConfig(network=CODES, image_size=8)}


def tiny_run(path: Path | str, kind: str = "kl", *, codebook: CodebookLearning | None = None, **changes: Any) -> TokenizerRun:
    """On images written by `tests.tiny.write_images`; ``changes`` go to the loop, or replace whole parts."""
    parts = {name: changes.pop(name) for name in ("loss", "discriminator", "optim", "data") if name in changes}
    loop: dict[str, Any] = {"images": 48, "batch_size": 8, "log_images": 16, "sample_images": 0, "save_images": 16} | changes
    run = TokenizerRun(
        data=ImagesConfig(path=str(path)),
        tokenizer=TOKENIZERS[kind],
        loss=LossConfig(kl_weight=1e-3),
        discriminator=DiscriminatorConfig(weight=0.3, start_images=16, width=8, layers=1),
        codebook=codebook or CodebookLearning(),
        optim=OptimConfig(lr=3e-3, betas=(0.5, 0.9), weight_decay=0.0),
        train=TokenizerLoopConfig(**loop),
    )
    return replace(run, **parts)
