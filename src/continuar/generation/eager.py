"""Generation, step by step, as one would explain it: the readable truth that every faster engine must equal.

1. Arrange positions: known ones first, then the unknown in the order in which they will be generated.
2. For each step of the plan: z at this step's positions, with the unconditional z beside it if guided.
3. The head draws those tokens; they are embedded and committed.

An order that chooses while generating is asked for z at all unknown positions, and picks this step's among the tokens drawn there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from continuar.errors import require
from continuar.generation.plan import PlanStep, SamplingOptions, make_plan
from continuar.guidance import Guidance
from continuar.model import Model
from continuar.noise import KeyedNoise, RowNoise
from continuar.rows import put_, take
from continuar.tokenizers import TokenSpec

NoiseOf = Callable[..., RowNoise]


@dataclass(frozen=True)
class Start:
    """Where a batch starts. Every row must have the same number of known tokens.

    Attributes:
        condition: int64 labels [B], or vectors [B, C, dim], as the model's condition is; None: the null condition for all.
        seeds_B: int64.
        tokens: values at known positions, anything elsewhere; [B, N, D] or ids [B, N].
        known_BN: bool.
    """

    condition: Tensor | None
    seeds_B: Tensor
    tokens: Tensor
    known_BN: Tensor

    @classmethod
    def blank(cls, tokens: TokenSpec, seeds_B: Tensor, condition: Tensor | None = None) -> Start:
        """A start at which nothing is known, on the device of the seeds."""
        batch, device = len(seeds_B), seeds_B.device
        unknown = torch.zeros(batch, tokens.positions, dtype=torch.bool, device=device)
        return cls(condition, seeds_B, tokens.blank(batch, device), unknown)


@dataclass(frozen=True)
class Progress:
    """After a step: all tokens (zeros where unknown), which are known, and the step's index and count."""

    tokens: Tensor
    known_BN: Tensor
    step: int
    steps: int


@dataclass(frozen=True)
class Begun:
    """A generation before its first step; what every engine begins with.

    Attributes:
        options: with the head's own filled in.
        order_BN: known positions first, then the unknown as they come.
        plan: the steps.
        cond: embedded conditions, [B copies, C, E]: with guidance the null conditions are B more rows.
        copies: 2 with guidance, 1 without.
        tokens: at known positions; zeros elsewhere.
        known_BN: bool. known: how many each image knows.
    """

    options: SamplingOptions
    order_BN: Tensor
    plan: tuple[PlanStep, ...]
    cond: Tensor
    copies: int
    tokens: Tensor
    known_BN: Tensor
    known: int


def begin(model: Model, start: Start, options: SamplingOptions, order_BN: Tensor | None = None) -> Begun:
    """Checks a start and its options, and arranges them.

    Raises:
        UserError: a model in training mode, images that know unequally many tokens, conditions that are not one per image, or
            options that the model cannot follow.
    """
    require(not model.training, "the model is in training mode, whose dropout would change its images; call model.eval() first")
    options = options.for_head(model.config.head)
    counts = start.known_BN.sum(1).unique().tolist()
    require(len(counts) <= 1, f"images of one batch know {counts} tokens; allowed: equally many (a pipeline groups them)")
    known = counts[0] if counts else 0
    if order_BN is None:
        order_BN = model.order.arrange(start.known_BN, start.seeds_B)
    plan = make_plan(model.order, options, model.order.positions - known)
    assert options.head is not None
    options.head.check_tokens(model.config.tokens.size)
    # Guidance runs the null condition as B more rows of the same batch; without it they are not there at all.
    # With the null condition itself both halves would be the same.
    guided = options.guidance != 1.0 and start.condition is not None
    null = model.condition.null(len(start.seeds_B))
    cond = null if start.condition is None else model.condition(start.condition)
    require(len(cond) == len(null), f"{len(cond)} conditions for {len(null)} seeds; allowed: one each")
    cond, copies = (torch.cat((cond, null)), 2) if guided else (cond, 1)

    blank = ~start.known_BN
    tokens = start.tokens.masked_fill(blank if start.tokens.ndim == 2 else blank.unsqueeze(-1), 0)
    return Begun(options, order_BN, plan, cond, copies, tokens, start.known_BN.clone(), known)


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
        noise_of: (seeds of the rows, positions of the rows) -> their noise; for an order that chooses, (seeds, positions, step).
    """
    begun = begin(model, start, options, order_BN)
    options, order_BN, plan, copies = begun.options, begun.order_BN, begun.plan, begun.copies
    tokens, known_BN, guided, device = begun.tokens, begun.known_BN, begun.copies == 2, start.seeds_B.device
    assert options.head is not None
    state = model.backbone.start(begun.cond, model.order.positions)
    _commit(model, state, tokens, order_BN[:, : begun.known], copies)
    # Filled on the device: copying a number there would wait for all work before it.
    temperature = torch.full((), options.temperature, device=device)

    for number, step in enumerate(plan):
        if model.order.chooses:
            unknown = order_BN.shape[1] - step.start
            query = known_BN.to(torch.int8).argsort(dim=1, stable=True)[:, :unknown]
            noise = noise_of(start.seeds_B.repeat_interleave(unknown), query.flatten(), number)
        else:
            query = order_BN[:, step.start : step.start + step.size].sort(dim=1).values
            noise = noise_of(start.seeds_B.repeat_interleave(step.size), query.flatten())
        z = model.backbone.predict(state, query.repeat(copies, 1)).flatten(0, 1)
        rows = query.numel()
        guidance = Guidance(z[rows:], torch.full((), step.scale, device=device)) if guided else None
        drawn = model.head.draw(z[:rows], options=options.head, temperature=temperature, noise=noise, guidance=guidance)
        index, values = query, drawn.tokens.unflatten(0, query.shape)
        if model.order.chooses:
            assert drawn.log_prob is not None
            log_prob = drawn.log_prob.view(query.shape)
            chosen = model.order.choose(step.size, (number + 1) / len(plan), log_prob, noise).sort(dim=1).values
            index, values = take(query, chosen), take(values, chosen)
        put_(tokens, index, values)
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
    """All tokens of a batch. Known tokens come back unchanged."""
    tokens = start.tokens
    for progress in stream(model, start, options, order_BN=order_BN, noise_of=noise_of):
        tokens = progress.tokens
    return tokens


def _commit(model: Model, state: Any, tokens: Tensor, index_BK: Tensor, copies: int) -> None:
    """Embeds the tokens at these positions and tells the backbone, in every copy of the batch."""
    if index_BK.shape[1]:
        x = model.token_embedding(take(tokens, index_BK))
        model.backbone.commit(state, index_BK.repeat(copies, 1), x.repeat(copies, 1, 1))
