"""The baseline DiT (Peebles & Xie 2023) on the same tokens as `digits` and `cifar10`, for the paper's Figure 6.

Needs the extra [diffusers]. Its speed is a matter of ``--diffusion-steps``: every one of them is a pass through the whole network.
"""

from continuar.baselines import DiTNetworkConfig
from continuar.generation.plan import SamplingOptions
from continuar.heads import DiffusionOptions
from continuar.recipes.cifar10 import cifar10
from continuar.recipes.digits import digits
from continuar.training.config import DiTRun, Run


def dit_digits() -> DiTRun:
    """DiT on scikit-learn's 8x8 handwritten digits, 16 tokens of 2x2 pixels, on a CPU.

    continuar train dit_digits

    About 100 s on one core. 300 of 300 samples are read as what was asked for (`docs/results.md`).
    """
    return _like(digits(), DiTNetworkConfig(width=96, depth=4, heads=4, prediction="velocity"), diffusion_steps=50)


def dit_cifar10() -> DiTRun:
    """DiT on CIFAR-10 (32x32), 64 tokens of 4x4 pixels, on one GPU.

    continuar train dit_cifar10 --data.path DIR_OR_PARQUET

    9.8 M parameters; images, batch and learning rate are those of `cifar10`. Trained on 2 million images
    (docs/results.md, Figure 6); guidance is a guess.
    """
    return _like(cifar10(), DiTNetworkConfig(width=256, depth=8, heads=8, prediction="velocity"), diffusion_steps=100)


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
            guidance=1.5, guidance_schedule="constant", head=DiffusionOptions(diffusion_steps=diffusion_steps)
        ),
    )
