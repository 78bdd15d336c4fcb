"""The options of a generation: steps, guidance, temperature, and those of the model's head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from continuar.errors import require
from continuar.heads import HeadConfig, HeadOptions, with_values
from continuar.models.autoregressive import ModelConfig
from continuar.models.dit import DiTConfig

GuidanceSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to generate. A model carries its best values; each can be overridden per call."""

    steps: int | None = None
    """Autoregressive steps, 1 to the number of tokens (paper: 64; 256 for the best FID). None: the order's default, which is one
    per token for orders that predict one at a time, and 64 for orders that predict groups."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, 0 or more; 1 is none (paper: B 2.9, L 3.0, H 3.2)."""
    guidance_schedule: GuidanceSchedule = "linear"
    """"linear" grows to the scale with the share of known tokens; "constant" uses it at every step."""
    temperature: float = 1.0
    """0 or more; lower is less diverse. Each head documents what it scales."""
    head: HeadOptions | None = None
    """Options of the head; None: the head's defaults."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}; allowed: 1 to the number of tokens")
        for name, value in (("guidance_scale", self.guidance_scale), ("temperature", self.temperature)):
            require(0 <= value < float("inf"), f"{name} is {value}; allowed: 0 or more, finite")
        require(
            self.guidance_schedule in ("linear", "constant"),
            f"guidance schedule is '{self.guidance_schedule}'; allowed: linear, constant",
        )
        if self.head is not None:
            self.head.check_temperature(self.temperature)

    def for_head(self, config: HeadConfig | ModelConfig | DiTConfig) -> SamplingOptions:
        """These options, with the head's options filled in if they are None.

        Raises:
            UserError: the head's options are of another kind of head.
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
        head_values = {k: v for k, v in given.items() if k not in own}
        if head_values:
            assert self.head is not None, "for_head comes first"
            given["head"] = with_values(self.head, head_values)
        return replace(self, **{k: v for k, v in given.items() if k in own})

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, the head's among them: `override` takes them, and they are written beside generated images."""
        values = asdict(self)
        head_values = values.pop("head") or {}
        return values | {k: v for k, v in head_values.items() if k != "kind"}
