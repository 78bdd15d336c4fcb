"""CIFAR-10 as latents of tokenizers that are trained here: continuous ones for a MAR, ids for an AR model.

Each takes three commands: a tokenizer, a cache of its latents, and the model, which takes its tokenizer from the cache. Both
have run end to end on 2 million images, not yet at their full length (docs/results.md).
"""

from __future__ import annotations

from dataclasses import replace

from continuar.heads import CategoricalHeadConfig
from continuar.recipes.cifar10 import cifar10
from continuar.recipes.comparison import ROWS, comparison_run
from continuar.recipes.tokenizers import kl_cifar10, vq_cifar10
from continuar.tokenizers import VQConfig
from continuar.training.config import Run


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
