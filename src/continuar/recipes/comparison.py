"""Models to compare, on equal terms.

* ``digits_ROW_HEAD``, ``cifar10_ROW_HEAD``: every row of the paper's comparison (Table 1, and Table 5 for the on-the-fly order)
  with every head that can serve it; on digits in less than three minutes each on a CPU, on CIFAR-10 on one GPU.
* ``mar_kl_cifar10``, ``ar_vq_cifar10``: CIFAR-10 as latents of tokenizers that are trained here.
* ``dit_digits``, ``dit_cifar10``: the baseline DiT (Peebles & Xie 2023) of the paper's Figure 6. It needs the extra [diffusers].

Within a data set, backbones have equal width and equally many blocks, and heads see the same images for equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from continuar.heads import (
    CategoricalHeadConfig,
    DiffusionHeadConfig,
    DiffusionOptions,
    FlowHeadConfig,
    HeadConfig,
    MixtureHeadConfig,
    RegressionHeadConfig,
)
from continuar.models import CausalConfig, MAEConfig
from continuar.models.dit import DiTNetworkConfig
from continuar.orders import ConfidenceOrderConfig, MAROrderConfig, OrderConfig, RandomOrderConfig, RasterOrderConfig
from continuar.recipes.images import cifar10, digits
from continuar.recipes.tokenizers import kl_cifar10, vq_cifar10
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import CodebookConfig, PixelConfig
from continuar.training.config import DiTRun, Run


@dataclass(frozen=True)
class Row:
    """One row of the comparison."""

    title: str
    order: OrderConfig
    causal: bool


ROWS = {
    "ar_raster": Row("AR, raster order, causal with kv-cache", RasterOrderConfig(), causal=True),
    "ar_random": Row("AR, random order, causal with kv-cache", RandomOrderConfig(), causal=True),
    "mar_one": Row("random order, bidirectional, one token per step", RandomOrderConfig(), causal=False),
    "mar": Row("MAR: random order, bidirectional, several tokens per step", MAROrderConfig(), causal=False),
    "mar_confidence": Row("most probable tokens first, bidirectional", ConfidenceOrderConfig(), causal=False),
}


def comparison_run(base: Run, row: Row, head: HeadConfig, vocabulary: int) -> Run:
    """``base``, a MAR with diffusion loss on pixels, with another order, backbone and head."""
    backbone, tokenizer, optim = base.backbone, base.tokenizer, base.optim
    assert isinstance(backbone, MAEConfig)
    assert isinstance(tokenizer, PixelConfig)
    sampling = replace(base.sampling, head=base.sampling.head if head.kind == "diffusion" else None)
    if row.order.max_group is not None:
        # One token per step: the number of steps is the number of tokens.
        sampling = replace(sampling, steps=None)
    if head.kind == "regression":
        sampling = replace(sampling, guidance_scale=1.0)
    if head.token_kind == "id":
        # Ids of a k-means codebook of the same patches. A cosine decay suits cross-entropy better.
        size, patch, channels = tokenizer.image_size, tokenizer.patch, tokenizer.channels
        tokenizer = CodebookConfig(image_size=size, patch=patch, channels=channels, vocabulary=vocabulary)
        optim = replace(optim, decay="cosine", decay_images=0)
    if row.causal:
        # As many blocks as encoder and decoder together.
        backbone = CausalConfig(
            width=backbone.width,
            depth=backbone.encoder_depth + backbone.decoder_depth,
            heads=backbone.heads,
            attention_dropout=backbone.attention_dropout,
            dropout=backbone.dropout,
        )
    return replace(base, tokenizer=tokenizer, order=row.order, backbone=backbone, head=head, optim=optim, sampling=sampling)


def _short_digits() -> Run:
    base = digits()
    assert isinstance(base.head, DiffusionHeadConfig)
    # Less than half of the recipe `digits`: the slowest of these runs takes two minutes on one core.
    train = replace(base.train, images=30_000, sample_images=30_000, save_images=30_000)
    head = replace(base.head, diffusion_batch_mul=2)
    return replace(base, train=train, optim=replace(base.optim, decay_images=24_000), head=head)


def _heads(base: Run, min_std: float) -> dict[str, HeadConfig]:
    head = base.head
    assert isinstance(head, DiffusionHeadConfig)
    return {
        "diffusion": head,
        "flow": FlowHeadConfig(width=head.width, depth=head.depth, diffusion_batch_mul=head.diffusion_batch_mul),
        "categorical": CategoricalHeadConfig(),
        "mixture": MixtureHeadConfig(components=16, min_std=min_std),
        "regression": RegressionHeadConfig(width=head.width, depth=head.depth),
    }


def comparison_recipes() -> Iterator[Callable[[], Run]]:
    """Every row with every head that can serve it, on both data sets."""
    # Pixels repeat exact values, and a mixture that may be narrow spends itself on them: with a floor of 0.05 std instead of 0.2,
    # which is about one of the digits' 17 grey levels, its samples could not be read.
    for prefix, base, vocabulary, min_std in (("digits", _short_digits, 128, 0.2), ("cifar10", cifar10, 1024, 0.05)):
        for row_name, row in ROWS.items():
            for head_name, head in _heads(base(), min_std).items():
                if not row.order.needs_log_prob or head.has_log_prob:
                    name = f"{prefix}_{row_name}_{head_name}"
                    command = f"continuar train {name}" + (" --data.path DIR_OR_PARQUET" if prefix == "cifar10" else "")
                    yield _recipe(name, f"{row.title}; {head_name} head.\n\n{command}\n", base, row, head, vocabulary)


def _recipe(name: str, doc: str, base: Callable[[], Run], row: Row, head: HeadConfig, vocabulary: int) -> Callable[[], Run]:
    def recipe() -> Run:
        return comparison_run(base(), row, head, vocabulary)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = doc
    return recipe


def mar_kl_cifar10() -> Run:
    """MAR on KL latents of CIFAR-10: 8 x 8 tokens of 8 channels, the model of `cifar10`, on one GPU.

    continuar tokenizer train kl_cifar10 --data.path DATA --loss.perceptual-weights squeezenet1_1.safetensors
    continuar cache DATA runs/kl_cifar10 latents/kl_cifar10
    continuar train mar_kl_cifar10 --data.path latents/kl_cifar10

    Trained on 2 million of its 30 million images; SqueezeNet Frechet distance in docs/results.md.
    """
    return replace(cifar10(), tokenizer=kl_cifar10().tokenizer)


def ar_vq_cifar10() -> Run:
    """AR on VQ ids of CIFAR-10, raster order, causal: 8 x 8 ids of a codebook of 1,024, on one GPU.

    continuar tokenizer train vq_cifar10 --data.path DATA --loss.perceptual-weights squeezenet1_1.safetensors
    continuar cache DATA runs/vq_cifar10 latents/vq_cifar10
    continuar train ar_vq_cifar10 --data.path latents/vq_cifar10

    Trained on 2 million of its 30 million images; SqueezeNet Frechet distance in docs/results.md.
    """
    tokenizer = vq_cifar10().tokenizer
    run = comparison_run(cifar10(), ROWS["ar_raster"], CategoricalHeadConfig(), tokenizer.spec.vocabulary)
    return replace(run, tokenizer=tokenizer)


def dit_digits() -> DiTRun:
    """DiT on scikit-learn's 8x8 handwritten digits, 16 tokens of 2x2 pixels, on a CPU.

    continuar train dit_digits

    0.72 M parameters, about 100 s on one core. 300 of 300 samples are read as the digit that was asked for (docs/results.md).
    """
    return _dit(digits(), DiTNetworkConfig(width=96, depth=4, heads=4, prediction="v_prediction"), diffusion_steps=50)


def dit_cifar10() -> DiTRun:
    """DiT on CIFAR-10 (32x32), 64 tokens of 4x4 pixels, on one GPU.

    continuar train dit_cifar10 --data.path DIR_OR_PARQUET

    9.8 M parameters. Trained on 2 million of its 30 million images (docs/results.md, Figure 6). The guidance scale was not tuned.
    """
    return _dit(cifar10(), DiTNetworkConfig(width=256, depth=8, heads=8, prediction="v_prediction"), diffusion_steps=100)


def _dit(base: Run, network: DiTNetworkConfig, diffusion_steps: int) -> DiTRun:
    """A DiT on the same tokens and the same training as ``base``."""
    # Every diffusion step is a pass through the whole network, so that diffusion_steps alone decides the speed.
    head = DiffusionOptions(diffusion_steps=diffusion_steps)
    sampling = SamplingOptions(guidance_scale=1.5, guidance_schedule="constant", head=head)
    shared = {name: getattr(base, name) for name in ("data", "tokenizer", "optim", "ema", "train")}
    return DiTRun(**shared, network=network, sampling=sampling)
