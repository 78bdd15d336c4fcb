"""Sampling settings as options, for commands that hand them on to `Pipeline.__call__`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SamplingSettings:
    """What is not given is the model's own."""

    steps: int | None = None
    """Autoregressive steps, 1 to the number of tokens."""
    diffusion_steps: int | None = None
    """Denoising steps per token, 1 to 1000."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 0 or more; 1 is none."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """How guidance grows over the steps."""
    temperature: float | None = None
    """Scale of the noise of denoising steps, 0 or more; lower is less diverse."""
    sampler: Literal["ddpm", "ddim"] | None = None
    """How a token is denoised."""

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}
