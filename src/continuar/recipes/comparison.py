"""Every row of the paper's comparison (Table 1, and Table 5 for the on-the-fly order) with every head that can serve it.

`digits_ROW_HEAD` on handwritten digits on a CPU (under three minutes each), `cifar10_ROW_HEAD` on one GPU. Rows:

* ``ar_raster``: causal, raster order, kv-cache.
* ``ar_random``: causal, random order, kv-cache, told which position comes next.
* ``mar_one``: bidirectional, random order, one token per step.
* ``mar``: bidirectional, random order, several tokens per step.
* ``mar_confidence``: bidirectional, the most probable tokens first.

Within a data set, backbones have equal width and equally many blocks, and heads see the same images for equally long. Categorical
heads see ids of a k-means codebook of the same patches; their learning rate falls by a cosine, which suits cross-entropy better.

CIFAR-10 as latents of tokenizers that are trained here: continuous ones for a MAR, ids for an AR model.

Each takes three commands: a tokenizer, a cache of its latents, and the model, which takes its tokenizer from the cache. Both
have run end to end on 2 million images, not yet at their full length (docs/results.md).

The baseline DiT (Peebles & Xie 2023) on the same tokens as `digits` and `cifar10`, for the paper's Figure 6.

Needs the extra [diffusers]. Its speed is a matter of ``--diffusion-steps``: every one of them is a pass through the whole network.
"""

from __future__ import annotations

import dataclasses
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
from continuar.models import BackboneConfig, CausalConfig, MAEConfig
from continuar.models.dit import DiTNetworkConfig
from continuar.orders import ConfidenceOrderConfig, MAROrderConfig, OrderConfig, RandomOrderConfig, RasterOrderConfig
from continuar.recipes.images import cifar10, digits
from continuar.recipes.tokenizers import kl_cifar10, vq_cifar10
from continuar.sampling.generate import SamplingOptions
from continuar.tokenizers import CodebookConfig, PixelConfig, VQConfig
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


def causal_twin(backbone: MAEConfig) -> CausalConfig:
    """The causal backbone of the same width with as many blocks as encoder and decoder together."""
    return CausalConfig(
        width=backbone.width,
        depth=backbone.encoder_depth + backbone.decoder_depth,
        heads=backbone.heads,
        attention_dropout=backbone.attention_dropout,
        dropout=backbone.dropout,
    )


def comparison_run(base: Run, row: Row, head: HeadConfig, vocabulary: int) -> Run:
    """``base``, a MAR with diffusion loss on pixels, with another order, backbone and head."""
    assert isinstance(base.backbone, MAEConfig)
    assert isinstance(base.tokenizer, PixelConfig)
    backbone: BackboneConfig = causal_twin(base.backbone) if row.causal else base.backbone
    grouped = row.order.max_group is None
    sampling = dataclasses.replace(base.sampling, steps=base.sampling.steps if grouped else None, head=None)
    if head.kind == "diffusion":
        sampling = dataclasses.replace(sampling, head=base.sampling.head)
    if head.kind == "regression":
        sampling = dataclasses.replace(sampling, guidance_scale=1.0)
    tokenizer, optim = base.tokenizer, base.optim
    if head.token_kind == "id":
        tokenizer = CodebookConfig(
            image_size=tokenizer.image_size, patch=tokenizer.patch, channels=tokenizer.channels, vocabulary=vocabulary
        )
        optim = dataclasses.replace(optim, decay="cosine", decay_images=0)
    return dataclasses.replace(
        base, tokenizer=tokenizer, order=row.order, backbone=backbone, head=head, optim=optim, sampling=sampling
    )


def _digits() -> Run:
    base = digits()
    assert isinstance(base.head, DiffusionHeadConfig)
    # Less than half of the recipe `digits`: the slowest of these runs takes two minutes on one core.
    train = dataclasses.replace(base.train, images=30_000, sample_images=30_000, save_images=30_000)
    optim = dataclasses.replace(base.optim, decay_images=24_000)
    head = dataclasses.replace(base.head, diffusion_batch_mul=2)
    return dataclasses.replace(base, train=train, optim=optim, head=head)


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


def _recipe(
    prefix: str, row_name: str, head_name: str, base: Callable[[], Run], vocabulary: int, min_std: float
) -> Callable[[], Run]:
    """A recipe like any other: a function with a name, whose docstring holds its command."""

    def recipe() -> Run:
        start = base()
        return comparison_run(start, ROWS[row_name], _heads(start, min_std)[head_name], vocabulary)

    name = f"{prefix}_{row_name}_{head_name}"
    data = " --data.path DIR_OR_PARQUET" if prefix == "cifar10" else ""
    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = f"{ROWS[row_name].title}; {head_name} head.\n\ncontinuar train {name}{data}\n"
    return recipe


def comparison_recipes() -> Iterator[Callable[[], Run]]:
    """Every row with every head that can serve it, at both sizes."""
    # Pixels repeat exact values, and a mixture that may be narrow spends itself on them: with a floor of 0.05 std instead of 0.2,
    # which is about one of the digits' 17 grey levels, its samples could not be read.
    for prefix, base, vocabulary, min_std in (("digits", _digits, 128, 0.2), ("cifar10", cifar10, 1024, 0.05)):
        start = base()
        for row_name, row in ROWS.items():
            for head_name, head in _heads(start, min_std).items():
                if not row.order.needs_log_prob or head.has_log_prob:
                    yield _recipe(prefix, row_name, head_name, base, vocabulary, min_std)


def mar_kl_cifar10() -> Run:
    """MAR on KL latents of CIFAR-10: 8 x 8 tokens of 8 channels, on one GPU.

    continuar tokenizer train kl_cifar10 --data.path DATA --loss.perceptual-weights squeezenet1_1.safetensors
    continuar cache DATA runs/kl_cifar10 latents/kl_cifar10
    continuar train mar_kl_cifar10 --data.path latents/kl_cifar10

    The model is that of the recipe `cifar10`, whose tokens are as many patches of pixels.
    """
    return replace(cifar10(), tokenizer=kl_cifar10().tokenizer)


def ar_vq_cifar10() -> Run:
    """AR on VQ ids of CIFAR-10, raster order, causal: 8 x 8 ids of a codebook of 1,024, on one GPU.

    continuar tokenizer train vq_cifar10 --data.path DATA --loss.perceptual-weights squeezenet1_1.safetensors
    continuar cache DATA runs/vq_cifar10 latents/vq_cifar10
    continuar train ar_vq_cifar10 --data.path latents/vq_cifar10

    The model is that of the recipe `cifar10_ar_raster_categorical`, whose ids are of patches of pixels.
    """
    tokenizer = vq_cifar10().tokenizer
    assert isinstance(tokenizer, VQConfig)
    run = comparison_run(cifar10(), ROWS["ar_raster"], CategoricalHeadConfig(), tokenizer.spec.vocabulary)
    return replace(run, tokenizer=tokenizer)


def dit_digits() -> DiTRun:
    """DiT on scikit-learn's 8x8 handwritten digits, 16 tokens of 2x2 pixels, on a CPU.

    continuar train dit_digits

    About 100 s on one core. 300 of 300 samples are read as what was asked for (`docs/results.md`).
    """
    return _like(digits(), DiTNetworkConfig(width=96, depth=4, heads=4, prediction="v_prediction"), diffusion_steps=50)


def dit_cifar10() -> DiTRun:
    """DiT on CIFAR-10 (32x32), 64 tokens of 4x4 pixels, on one GPU.

    continuar train dit_cifar10 --data.path DIR_OR_PARQUET

    9.8 M parameters; images, batch and learning rate are those of `cifar10`. Trained on 2 million images
    (docs/results.md, Figure 6); guidance is a guess.
    """
    return _like(cifar10(), DiTNetworkConfig(width=256, depth=8, heads=8, prediction="v_prediction"), diffusion_steps=100)


def _like(base: Run, network: DiTNetworkConfig, diffusion_steps: int) -> DiTRun:
    """A DiT on the tokens of a run, trained as that is."""
    return DiTRun(
        data=base.data,
        tokenizer=base.tokenizer,
        network=network,
        optim=base.optim,
        ema=base.ema,
        train=base.train,
        sampling=SamplingOptions(
            guidance_scale=1.5, guidance_schedule="constant", head=DiffusionOptions(diffusion_steps=diffusion_steps)
        ),
    )
