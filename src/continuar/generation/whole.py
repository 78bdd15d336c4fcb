"""Generation by a model that has one step for all tokens: a DiT."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from continuar.baselines import DiT
from continuar.errors import require
from continuar.generation.eager import Progress, Start
from continuar.generation.plan import SamplingOptions, make_plan
from continuar.heads import DiffusionOptions


def stream(model: DiT, start: Start, options: SamplingOptions) -> Iterator[Progress]:
    """Yields after the one step of a DiT; not at all where all tokens are known.

    Raises:
        UserError: some tokens are known, or options that are not of a diffusion.
    """
    require(not model.training, "the model is in training mode; call model.eval() first")
    options = options.for_head(model.config)
    assert isinstance(options.head, DiffusionOptions)
    batch, device = len(start.seeds_B), start.seeds_B.device
    unknown = (~start.known_BN).sum(1).unique().tolist()
    require(len(unknown) <= 1, f"images of one batch lack {unknown} tokens; allowed: equally many (a pipeline groups them)")
    labels = torch.full((batch,), model.null_label, device=device) if start.condition is None else start.condition
    for step in make_plan(model.order, options, unknown[0] if unknown else 0):
        tokens = model.sample(
            labels,
            start.seeds_B,
            steps=options.head.diffusion_steps,
            # Of the null condition both halves would be the same.
            guidance=1.0 if start.condition is None else step.scale,
            temperature=options.temperature,
            sampler=options.head.sampler,
        )
        yield Progress(tokens, torch.ones_like(start.known_BN), 0, 1)
