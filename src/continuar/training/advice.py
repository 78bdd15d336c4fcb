"""What is known to disappoint and can be told before a run begins, one line each: the combination, then what is better."""

from __future__ import annotations

import logging

from continuar.baselines import DiTNetworkConfig
from continuar.heads import DiffusionHeadConfig
from continuar.parts import known_to_disappoint
from continuar.training.config import BaseRun, DiTRun, Run

_LOG = logging.getLogger("continuar")
SHORT_IMAGES = 1_000_000
"""Training images below which a predicted eps was seen to fail: digits came out black and white."""
INITIAL_SHARE = 0.1
"""The share of initial weights in an average at the end of a run above which its samples are poor."""


def warn(run: BaseRun) -> None:
    """Logs every line of `advice`."""
    for line in advice(run):
        _LOG.warning(line)


def advice(run: BaseRun) -> list[str]:
    """Of parts (`parts.known_to_disappoint`) and of how they are trained."""
    loop, ema = run.train, run.ema
    found = known_to_disappoint(run.tokenizer, run.head) if isinstance(run, Run) else []
    diffusion, field = (run.network, "network") if isinstance(run, DiTRun) else (run.head if isinstance(run, Run) else None, "head")
    if (
        isinstance(diffusion, DiffusionHeadConfig | DiTNetworkConfig)
        and diffusion.prediction == "eps"
        and loop.images < SHORT_IMAGES
        and not run.init
    ):
        found.append(
            f"a predicted eps after {loop.images:,} images is known to give black and white samples, for sampling multiplies "
            f"its error by 300 at first; better: --{field}.prediction velocity"
        )
    share = ema.decay**loop.steps
    if not ema.warmup and share > INITIAL_SHARE and not run.init:
        found.append(
            f"without warm-up the average still holds {share:.0%} of the initial weights after {loop.steps:,} steps; "
            "better: --ema.warmup"
        )
    if loop.label_dropout == 0 and run.sampling.guidance != 1:
        found.append(
            f"guidance of {run.sampling.guidance:g} takes the null condition, which is never trained with train.label_dropout 0; "
            "better: --train.label-dropout 0.1, or --sampling.guidance 1"
        )
    return found
