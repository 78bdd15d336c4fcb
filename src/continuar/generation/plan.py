"""What will happen in a generation, decided on the host before it starts: group sizes, and the guidance of each step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from continuar.errors import require
from continuar.guidance import GuidanceSchedule, check_scale, guidance_scale
from continuar.heads import HeadOptions, with_values
from continuar.orders import Order


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
    guidance: float = 1.0
    """Scale of classifier-free guidance, 0 or more; 1 is none (paper: B 2.9, L 3.0, H 3.2)."""
    guidance_schedule: GuidanceSchedule = "linear"
    """"linear" grows to the scale with the share of known tokens; "constant" uses it at every step."""
    temperature: float = 1.0
    """0 or more; lower is less diverse. Each head says what it scales."""
    head: HeadOptions | None = None
    """The head's own options; None: its defaults."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}; allowed: 1 to the number of tokens")
        check_scale("guidance", self.guidance)
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
    total = order.positions
    require(
        options.steps is None or options.steps <= total, f"steps is {options.steps}; allowed: 1 to {total}, the number of tokens"
    )
    steps, start = [], total - unknown
    for size in order.group_sizes(options.steps, unknown):
        remaining = total - start - size
        steps.append(PlanStep(start, size, guidance_scale(options.guidance, options.guidance_schedule, remaining, total)))
        start += size
    return tuple(steps)
