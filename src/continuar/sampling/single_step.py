"""Generation by a DiT: one autoregressive step that predicts all tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from continuar.errors import require
from continuar.heads import DiffusionOptions
from continuar.models.dit import DiT
from continuar.sampling.generate import Progress, SamplingInput, make_plan
from continuar.sampling.options import SamplingOptions


def stream_single_step(model: DiT, inputs: SamplingInput, options: SamplingOptions) -> Iterator[Progress]:
    """Yields once, after the only step; not at all if every token is known.

    Raises:
        UserError: a model in training mode, images of which some tokens are known, or options of another head than diffusion.
    """
    require(not model.training, "the model is in training mode; call model.eval() first")
    options = options.for_head(model.config)
    assert isinstance(options.head, DiffusionOptions)
    unknown = (~inputs.known_BN).sum(1).unique().tolist()
    require(len(unknown) <= 1, f"images of one batch lack {unknown} tokens; allowed: equally many (a pipeline groups them)")
    labels = inputs.condition
    if labels is None:
        labels = torch.full_like(inputs.seeds_B, model.null_label)
    for step in make_plan(model.order, options, unknown[0] if unknown else 0):
        tokens = model.sample(
            labels,
            inputs.seeds_B,
            steps=options.head.diffusion_steps,
            # Without a condition both halves of guidance would be equal.
            guidance=1.0 if inputs.condition is None else step.scale,
            temperature=options.temperature,
            sampler=options.head.sampler,
        )
        yield Progress(tokens, torch.ones_like(inputs.known_BN), 0, 1)
