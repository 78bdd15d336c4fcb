"""What will happen in a generation, decided on the host before it starts: group sizes, and the guidance of each step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from continuar.diffusion.samplers import SamplerName, check_temperature
from continuar.errors import require
from continuar.guidance import GuidanceSchedule, check_scale, guidance_scale
from continuar.heads import HeadOptions
from continuar.orders import Order


@dataclass(frozen=True)
class SamplingOptions:
    """How to generate. A model carries the values it was found best with; each can be overridden per call."""

    steps: int = 64
    """Autoregressive steps, 1 to the number of tokens (paper: 64; 256 for the best FID)."""
    diffusion_steps: int = 100
    """Denoising steps per token, 1 to 1000; to 980 with "dpmpp"."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, 0 or more; 1 is none (paper: B 2.9, L 3.0, H 3.2)."""
    guidance_schedule: GuidanceSchedule = "linear"
    """"linear" grows to the scale with the share of known tokens; "constant" uses it at every step."""
    temperature: float = 1.0
    """Scales the noise that denoising steps add, 0 or more; lower is less diverse."""
    sampler: SamplerName = "ddpm"
    """"ddpm" is the paper's; "ddim" and "dpmpp" are deterministic given x_T and have no temperature; "dpmpp" needs fewest steps."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps is {self.steps}; allowed: 1 to the number of tokens")
        check_scale("guidance", self.guidance)
        check_scale("temperature", self.temperature)
        require(
            self.guidance_schedule in ("linear", "constant"),
            f"guidance schedule is '{self.guidance_schedule}'; allowed: linear, constant",
        )
        self.head_options()
        check_temperature(self.sampler, self.temperature)

    def head_options(self) -> HeadOptions:
        """The part a head sees."""
        return HeadOptions(self.diffusion_steps, self.sampler)

    def override(self, **values: Any) -> SamplingOptions:
        """A copy with every value that is not None replaced."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written beside generated images."""
        return asdict(self)


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
        UserError: steps outside 1..tokens.
    """
    total = order.positions
    require(options.steps <= total, f"steps is {options.steps}; allowed: 1 to {total}, the number of tokens")
    steps, start = [], total - unknown
    for size in order.group_sizes(min(options.steps, unknown), unknown) if unknown else ():
        remaining = total - start - size
        steps.append(PlanStep(start, size, guidance_scale(options.guidance, options.guidance_schedule, remaining, total)))
        start += size
    return tuple(steps)
