"""Classifier-free guidance (Ho & Salimans 2022) and its schedule over the autoregressive steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from continuar.errors import require

GuidanceSchedule = Literal["linear", "constant"]


@dataclass(frozen=True)
class Guidance:
    """What a head needs to guide: the unconditional condition vectors [M, Z] and the scale, a 0-d tensor on their device.

    The scale is a tensor because it changes at every step: as a Python float it would be baked into a captured graph.
    """

    z_uncond: Tensor
    scale: Tensor


def guidance_scale(scale: float, schedule: GuidanceSchedule, remaining: int, total: int) -> float:
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


def check_scale(name: str, value: float) -> None:
    """Refuses a guidance scale or temperature that is negative, infinite or NaN."""
    require(0 <= value < float("inf"), f"{name} is {value}; allowed: 0 or more, finite")
