"""Generation, step by step: the readable reference that every faster engine must equal.

1. `make_plan` decides on the host, before the first step, how many tokens each step predicts and at which guidance scale.
2. `prepare_batch` checks a batch, orders its positions (known ones first, then the unknown ones as they will be generated) and
   embeds its conditions.
3. `stream` follows the plan. In each step the backbone predicts z at the step's positions (with guidance also the unconditional z),
   the head draws a token from each z, and the tokens are embedded and committed to the backbone.

An order that chooses during generation has tokens drawn at all unknown positions, and keeps some of them in each step.

B images, N tokens per image, D token dim, C condition tokens, E backbone width, K positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from continuar.errors import require
from continuar.heads.base import Guidance
from continuar.models.autoregressive import Model
from continuar.noise import KeyedNoise, RowNoise
from continuar.orders import Order
from continuar.sampling.options import GuidanceSchedule, SamplingOptions
from continuar.tensors import batched_gather, batched_scatter_
from continuar.tokenizers import TokenSpec

NoiseOf = Callable[..., RowNoise]


@dataclass(frozen=True)
class PlanStep:
    """One autoregressive step: it predicts positions ``start .. start + size`` of the order at guidance scale ``scale``."""

    start: int
    size: int
    scale: float


def guidance_at_step(scale: float, schedule: GuidanceSchedule, remaining: int, total: int) -> float:
    """The guidance scale w_s of one step (paper, Section 4; linear as in MUSE, Chang et al. 2023).

    Args:
        scale: the final scale w; 1 is no guidance.
        schedule: "linear": w_s = 1 + (w - 1)(N - m_s)/N; "constant": w.
        remaining: m_s, the tokens that stay unknown after the step.
        total: N, the tokens of the image.
    """
    if schedule == "constant":
        return scale
    # The authors' code counts 1 remaining token in the last step, so the scale never quite reaches w.
    return 1 + (scale - 1) * (total - max(remaining, 1)) / total


def make_plan(order: Order, options: SamplingOptions, unknown: int) -> tuple[PlanStep, ...]:
    """The steps that generate the last ``unknown`` positions of an order; at most one step per token.

    Raises:
        UserError: a number of steps the order cannot take.
    """
    total = order.seq_len
    require(
        options.steps is None or options.steps <= total, f"steps is {options.steps}; allowed: 1 to {total}, the number of tokens"
    )
    steps, start = [], total - unknown
    for size in order.group_sizes(options.steps, unknown):
        remaining = total - start - size
        steps.append(PlanStep(start, size, guidance_at_step(options.guidance_scale, options.guidance_schedule, remaining, total)))
        start += size
    return tuple(steps)


@dataclass(frozen=True)
class SamplingInput:
    """A batch before its generation. Every image must have the same number of known tokens.

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
    def blank(cls, spec: TokenSpec, seeds_B: Tensor, condition: Tensor | None = None) -> SamplingInput:
        """An input with no known tokens, on the device of the seeds."""
        batch, device = len(seeds_B), seeds_B.device
        return cls(condition, seeds_B, spec.blank(batch, device), torch.zeros(batch, spec.seq_len, dtype=torch.bool, device=device))


@dataclass(frozen=True)
class Progress:
    """The state after a step: all tokens (zeros where unknown), which are known, and the step's index and count."""

    tokens: Tensor
    known_BN: Tensor
    step: int
    steps: int


class SamplingEngine(Protocol):
    """Generates with one model."""

    def stream(self, inputs: SamplingInput, options: SamplingOptions) -> Iterator[Progress]:
        """Generates a batch and yields after every step; see `stream`."""
        ...


@dataclass(frozen=True)
class PreparedBatch:
    """A batch ready for its first step; every engine begins with it.

    Attributes:
        options: with the head's options filled in.
        order_BN: known positions first, then the unknown ones in the order of generation.
        plan: the steps.
        cond: embedded conditions, [B copies, C, E]; with guidance the last B rows are the null condition.
        copies: 2 with guidance, 1 without.
        tokens: values at known positions, zeros elsewhere.
        known_BN: bool.
        known: how many tokens each image knows.
    """

    options: SamplingOptions
    order_BN: Tensor
    plan: tuple[PlanStep, ...]
    cond: Tensor
    copies: int
    tokens: Tensor
    known_BN: Tensor
    known: int


def prepare_batch(model: Model, inputs: SamplingInput, options: SamplingOptions, order_BN: Tensor | None = None) -> PreparedBatch:
    """Checks a batch and its options, plans the steps and embeds the conditions.

    Raises:
        UserError: a model in training mode, images with unequal numbers of known tokens, conditions that are not one per image, or
            options that the model cannot follow.
    """
    require(not model.training, "the model is in training mode, whose dropout would change its images; call model.eval() first")
    options = options.for_head(model.config.head)
    assert options.head is not None
    options.head.check_tokens(model.config.tokens.size)
    counts = inputs.known_BN.sum(1).unique().tolist()
    require(len(counts) <= 1, f"images of one batch know {counts} tokens; allowed: equally many (a pipeline groups them)")
    known = counts[0] if counts else 0
    if order_BN is None:
        order_BN = model.order.arrange(inputs.known_BN, inputs.seeds_B)
    plan = make_plan(model.order, options, model.order.seq_len - known)
    if inputs.condition is not None:
        model.condition.check(inputs.condition)
    null = model.condition.null(len(inputs.seeds_B))
    cond = null if inputs.condition is None else model.condition(inputs.condition)
    require(len(cond) == len(null), f"{len(cond)} conditions for {len(null)} seeds; allowed: one each")
    # Guidance runs the null condition as B more rows of the same batch. For images without a condition both halves would be equal,
    # so they run once whatever the scale.
    guided = options.guidance_scale != 1.0 and inputs.condition is not None
    cond, copies = (torch.cat((cond, null)), 2) if guided else (cond, 1)
    unknown = ~inputs.known_BN
    tokens = inputs.tokens.masked_fill(unknown if inputs.tokens.ndim == 2 else unknown.unsqueeze(-1), 0)
    return PreparedBatch(options, order_BN, plan, cond, copies, tokens, inputs.known_BN.clone(), known)


@torch.no_grad()
def stream(
    model: Model, inputs: SamplingInput, options: SamplingOptions, *, order_BN: Tensor | None = None, noise_of: NoiseOf = KeyedNoise
) -> Iterator[Progress]:
    """Generates a batch and yields after every autoregressive step; the next step changes the yielded tensors in place.

    Args:
        order_BN: replaces the order's own arrangement: known positions first, then the unknown ones in the order of generation.
        noise_of: (seeds of the rows, positions of the rows) -> their noise; an order that chooses adds the step.

    Raises:
        UserError: see `prepare_batch`.
    """
    batch = prepare_batch(model, inputs, options, order_BN)
    order_BN, tokens, known_BN, seeds_B = batch.order_BN, batch.tokens, batch.known_BN, inputs.seeds_B
    head_options, device = batch.options.head, seeds_B.device
    assert head_options is not None
    state = model.backbone.start(batch.cond, model.order.seq_len)

    def commit(index_BK: Tensor) -> None:
        """Embeds the tokens at these positions and gives them to the backbone, in every copy of the batch."""
        x = model.token_embedding(batched_gather(tokens, index_BK))
        model.backbone.commit(state, index_BK.repeat(batch.copies, 1), x.repeat(batch.copies, 1, 1))

    if batch.known:
        commit(order_BN[:, : batch.known])
    # `torch.full` fills on the device. Copying a number to a GPU would make the host wait for all work queued before it.
    temperature = torch.full((), batch.options.temperature, device=device)
    for number, step in enumerate(batch.plan):
        if model.order.chooses:
            unknown = model.order.seq_len - step.start
            # A stable sort of the mask lists the unknown positions first, in raster order.
            query = known_BN.to(torch.int8).argsort(dim=1, stable=True)[:, :unknown]
            # A position may be drawn again in a later step, so its noise depends on the step, too.
            noise = noise_of(seeds_B.repeat_interleave(unknown), query.flatten(), number)
        else:
            query = order_BN[:, step.start : step.start + step.size].sort(dim=1).values
            noise = noise_of(seeds_B.repeat_interleave(step.size), query.flatten())
        z = model.backbone.predict(state, query.repeat(batch.copies, 1)).flatten(0, 1)
        rows = query.numel()
        guidance = Guidance(z[rows:], torch.full((), step.scale, device=device)) if batch.copies == 2 else None
        drawn = model.head.draw(z[:rows], options=head_options, temperature=temperature, noise=noise, guidance=guidance)
        index, values = query, drawn.tokens.unflatten(0, query.shape)
        if model.order.chooses:
            assert drawn.log_prob is not None
            log_prob = drawn.log_prob.view(query.shape)
            chosen = model.order.choose(step.size, (number + 1) / len(batch.plan), log_prob, noise).sort(dim=1).values
            index, values = batched_gather(query, chosen), batched_gather(values, chosen)
        batched_scatter_(tokens, index, values)
        known_BN.scatter_(1, index, True)
        commit(index)
        yield Progress(tokens, known_BN, number, len(batch.plan))


def generate(
    model: Model, inputs: SamplingInput, options: SamplingOptions, *, order_BN: Tensor | None = None, noise_of: NoiseOf = KeyedNoise
) -> Tensor:
    """All tokens of a batch, [B, N, D] or ids [B, N]. Known tokens come back unchanged."""
    tokens = inputs.tokens
    for progress in stream(model, inputs, options, order_BN=order_BN, noise_of=noise_of):
        tokens = progress.tokens
    return tokens
