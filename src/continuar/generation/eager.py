"""Generation, step by step, as one would explain it: the readable truth that every faster engine must equal.

1. Arrange positions: known ones first, then the unknown in the order in which they will be generated.
2. For each step of the plan: z at this step's positions, with the unconditional z beside it if guided.
3. The head draws those tokens; they are embedded and committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from continuar.generation.plan import SamplingOptions, make_plan
from continuar.guidance import Guidance
from continuar.model import Model
from continuar.noise import KeyedNoise, RowNoise

NoiseOf = Callable[[Tensor, Tensor], RowNoise]


@dataclass(frozen=True)
class Start:
    """Where a batch starts. Every row must have the same number of known tokens.

    Attributes:
        labels_B: int64 0..classes (the last is the null condition).
        seeds_B: int64.
        tokens_BND: values at known positions; anything elsewhere.
        known_BN: bool.
    """

    labels_B: Tensor
    seeds_B: Tensor
    tokens_BND: Tensor
    known_BN: Tensor


@dataclass(frozen=True)
class Progress:
    """After a step: all tokens (zeros where unknown), which are known, and the step's index and count."""

    tokens_BND: Tensor
    known_BN: Tensor
    step: int
    steps: int


@torch.no_grad()
def stream(
    model: Model,
    start: Start,
    options: SamplingOptions,
    *,
    order_BN: Tensor | None = None,
    noise_of: NoiseOf = KeyedNoise,
) -> Iterator[Progress]:
    """Yields after every autoregressive step; the tensors are the engine's own and change with the next step.

    Args:
        order_BN: instead of the order's own arrangement: known positions first, then the unknown as they come.
        noise_of: (seeds of the rows, positions of the rows) -> their noise.
    """
    known = int(start.known_BN[0].sum()) if len(start.known_BN) else 0
    if order_BN is None:
        order_BN = model.order.arrange(start.known_BN, start.seeds_B)
    plan = make_plan(model.order, options, model.order.positions - known)
    batch, device = len(start.labels_B), start.labels_B.device
    # Guidance runs the null condition as B more rows of the same batch; without it they are not there at all.
    guided = options.guidance != 1.0
    labels = torch.cat((start.labels_B, torch.full_like(start.labels_B, model.null_label))) if guided else start.labels_B
    copies = 2 if guided else 1

    tokens = torch.where(start.known_BN.unsqueeze(-1), start.tokens_BND, 0.0)
    known_BN = start.known_BN.clone()
    state = model.backbone.start(model.condition(labels), model.order.positions)
    _commit(model, state, tokens, order_BN[:, :known], copies)
    temperature = torch.tensor(options.temperature, device=device)

    for number, step in enumerate(plan):
        index = order_BN[:, step.start : step.start + step.size].sort(dim=1).values
        z = model.backbone.predict(state, index.repeat(copies, 1)).flatten(0, 1)
        rows = batch * step.size
        guidance = Guidance(z[rows:], torch.tensor(step.scale, device=device)) if guided else None
        noise = noise_of(start.seeds_B.repeat_interleave(step.size), index.flatten())
        drawn = model.head.draw(z[:rows], options=options.head_options(), temperature=temperature, noise=noise, guidance=guidance)
        drawn_BKD = drawn.tokens.view(batch, step.size, -1).to(tokens.dtype)
        tokens.scatter_(1, index.unsqueeze(-1).expand_as(drawn_BKD), drawn_BKD)
        known_BN.scatter_(1, index, True)
        _commit(model, state, tokens, index, copies)
        yield Progress(tokens, known_BN, number, len(plan))


def generate(
    model: Model,
    start: Start,
    options: SamplingOptions,
    *,
    order_BN: Tensor | None = None,
    noise_of: NoiseOf = KeyedNoise,
) -> Tensor:
    """All tokens [B, N, D] of a batch. Known tokens come back unchanged."""
    tokens = start.tokens_BND
    for progress in stream(model, start, options, order_BN=order_BN, noise_of=noise_of):
        tokens = progress.tokens_BND
    return tokens


def _commit(model: Model, state: Any, tokens_BND: Tensor, index_BK: Tensor, copies: int) -> None:
    """Embeds the tokens at these positions and tells the backbone, in every copy of the batch."""
    if index_BK.shape[1]:
        x = model.token_embedding(tokens_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, tokens_BND.shape[-1])))
        model.backbone.commit(state, index_BK.repeat(copies, 1), x.repeat(copies, 1, 1))
