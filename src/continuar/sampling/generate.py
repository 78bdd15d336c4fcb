"""Classifier-free guidance (Ho & Salimans 2022) and its schedule over the autoregressive steps.

What will happen in a generation, decided on the host before it starts: group sizes, and the guidance of each step.

Generation, step by step, as one would explain it: the readable truth that every faster engine must equal.

1. Arrange positions: known ones first, then the unknown in the order in which they will be generated.
2. For each step of the plan: z at this step's positions, with the unconditional z beside it if guided.
3. The head draws those tokens; they are embedded and committed.

An order that chooses while generating is asked for z at all unknown positions, and picks this step's among the tokens drawn there.

Generation by a model that has one step for all tokens: a DiT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from continuar.errors import require
from continuar.heads import DiffusionOptions, HeadOptions, with_values
from continuar.heads.base import Guidance, check_scale
from continuar.models.autoregressive import Model
from continuar.models.dit import DiT
from continuar.noise import KeyedNoise, RowNoise
from continuar.orders import Order
from continuar.tensors import batched_gather, batched_scatter_
from continuar.tokenizers import TokenSpec

GuidanceSchedule = Literal["linear", "constant"]


def guidance_at_step(scale: float, schedule: GuidanceSchedule, remaining: int, total: int) -> float:
    """The scale w_s of one autoregressive step (paper, Section 4; linear as in MUSE, Chang et al. 2023).

    Args:
        scale: the final scale w; 1 is no guidance.
        schedule: "linear": w_s = 1 + (w - 1)(N - m_s)/N; "constant": w.
        remaining: m_s, how many tokens stay unknown after the step; counted as 1 at the last step, as the paper's code does.
        total: N, the tokens of the image.
    """
    if schedule == "constant":
        return scale
    return 1 + (scale - 1) * (total - max(remaining, 1)) / total


class Drawn(Protocol):
    """The config of what draws tokens: of a head, or of a model."""

    def options(self) -> HeadOptions:
        """The default options."""
        ...


@dataclass(frozen=True)
class SamplingOptions:
    """How to generate. A model carries the values it was found best with; each can be overridden per call."""

    steps: int | None = None
    """Autoregressive steps, 1 to the number of tokens (paper: 64; 256 for the best FID). None is the order's own number: one per
    token where it predicts one at a time, 64 where it predicts groups."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, 0 or more; 1 is none (paper: B 2.9, L 3.0, H 3.2)."""
    guidance_schedule: GuidanceSchedule = "linear"
    """"linear" grows to the scale with the share of known tokens; "constant" uses it at every step."""
    temperature: float = 1.0
    """0 or more; lower is less diverse. Each head says what it scales."""
    head: HeadOptions | None = None
    """The head's own options; None: its defaults."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}; allowed: 1 to the number of tokens")
        check_scale("guidance_scale", self.guidance_scale)
        check_scale("temperature", self.temperature)
        require(
            self.guidance_schedule in ("linear", "constant"),
            f"guidance schedule is '{self.guidance_schedule}'; allowed: linear, constant",
        )
        if self.head is not None:
            self.head.check_temperature(self.temperature)

    def for_head(self, config: Drawn) -> SamplingOptions:
        """These options with the head's own filled in.

        Raises:
            UserError: they are options of another kind of head.
        """
        defaults = config.options()
        options = defaults if self.head is None else self.head
        require(
            options.kind == defaults.kind,
            f"sampling options are of a {options.kind} head, the model's is {defaults.kind}; allowed: {defaults.kind}",
        )
        return replace(self, head=options)

    def override(self, **values: Any) -> SamplingOptions:
        """A copy with every value that is not None replaced: fields of this class, or of the head's options.

        Raises:
            UserError: a value that is not allowed, or an option the head does not have.
        """
        given = {k: v for k, v in values.items() if v is not None}
        own = {f.name for f in fields(self)}
        of_head = {k: v for k, v in given.items() if k not in own}
        if of_head:
            assert self.head is not None, "for_head comes first"
            given["head"] = with_values(self.head, of_head)
        return replace(self, **{k: v for k, v in given.items() if k in own})

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, the head's among them: what `override` takes, and what is written beside generated images."""
        values = asdict(self)
        of_head = values.pop("head") or {}
        return values | {k: v for k, v in of_head.items() if k != "kind"}


@dataclass(frozen=True)
class PlanStep:
    """One autoregressive step: positions ``start .. start + size`` of the order are predicted at guidance ``scale``."""

    start: int
    size: int
    scale: float


def make_plan(order: Order, options: SamplingOptions, unknown: int) -> tuple[PlanStep, ...]:
    """The steps that generate the last ``unknown`` positions of an order.

    With known tokens given, fewer may be left than steps were asked for; then there is one step per token.

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


NoiseOf = Callable[..., RowNoise]


@dataclass(frozen=True)
class SamplingInput:
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
    def blank(cls, tokens: TokenSpec, seeds_B: Tensor, condition: Tensor | None = None) -> SamplingInput:
        """A start at which nothing is known, on the device of the seeds."""
        batch, device = len(seeds_B), seeds_B.device
        unknown = torch.zeros(batch, tokens.seq_len, dtype=torch.bool, device=device)
        return cls(condition, seeds_B, tokens.blank(batch, device), unknown)


@dataclass(frozen=True)
class Progress:
    """After a step: all tokens (zeros where unknown), which are known, and the step's index and count."""

    tokens: Tensor
    known_BN: Tensor
    step: int
    steps: int


@dataclass(frozen=True)
class PreparedBatch:
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


def prepare(model: Model, start: SamplingInput, options: SamplingOptions, order_BN: Tensor | None = None) -> PreparedBatch:
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
    plan = make_plan(model.order, options, model.order.seq_len - known)
    assert options.head is not None
    options.head.check_tokens(model.config.tokens.size)
    # Guidance runs the null condition as B more rows of the same batch; without it they are not there at all.
    # With the null condition itself both halves would be the same.
    guided = options.guidance_scale != 1.0 and start.condition is not None
    null = model.condition.null(len(start.seeds_B))
    cond = null if start.condition is None else model.condition(start.condition)
    require(len(cond) == len(null), f"{len(cond)} conditions for {len(null)} seeds; allowed: one each")
    cond, copies = (torch.cat((cond, null)), 2) if guided else (cond, 1)

    blank = ~start.known_BN
    tokens = start.tokens.masked_fill(blank if start.tokens.ndim == 2 else blank.unsqueeze(-1), 0)
    return PreparedBatch(options, order_BN, plan, cond, copies, tokens, start.known_BN.clone(), known)


@torch.no_grad()
def stream(
    model: Model,
    start: SamplingInput,
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
    begun = prepare(model, start, options, order_BN)
    options, order_BN, plan, copies = begun.options, begun.order_BN, begun.plan, begun.copies
    tokens, known_BN, guided, device = begun.tokens, begun.known_BN, begun.copies == 2, start.seeds_B.device
    assert options.head is not None
    state = model.backbone.start(begun.cond, model.order.seq_len)
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
            index, values = batched_gather(query, chosen), batched_gather(values, chosen)
        batched_scatter_(tokens, index, values)
        known_BN.scatter_(1, index, True)
        _commit(model, state, tokens, index, copies)
        yield Progress(tokens, known_BN, number, len(plan))


def generate(
    model: Model,
    start: SamplingInput,
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
        x = model.token_embedding(batched_gather(tokens, index_BK))
        model.backbone.commit(state, index_BK.repeat(copies, 1), x.repeat(copies, 1, 1))


def stream_single_step(model: DiT, start: SamplingInput, options: SamplingOptions) -> Iterator[Progress]:
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
