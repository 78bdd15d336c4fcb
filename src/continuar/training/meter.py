"""What is measured while training: sums on the device, read on the host only when metrics are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continuar.heads.base import Timed
from continuar.training.parallel import Single

_QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


@dataclass(frozen=True)
class Averages:
    """Means over the steps since the last read."""

    loss: float
    gradient_norm: float
    token_std: float
    steps: int
    skipped: int
    bad_in_a_row: int
    loss_by_time: dict[str, float]
    """By quarter of the time, 0 (no noise, or a flow's beginning) to 1; of heads that draw times."""
    loss_by_masked: dict[str, float]
    """By masked share, rounded down to a tenth; where it varies."""


class Meter:
    """Sums on the device; see the module's docstring.

    Args:
        timed: of the model that trains; its losses by time are watched from here on.
        parallel: the processes that train together.
    """

    _FIELDS = ("loss", "norm", "std", "good", "skipped", "streak", "longest")

    def __init__(self, timed: Timed, device: torch.device, parallel: Single) -> None:
        self._device, self._parallel = device, parallel
        # One tensor for ever: CUDA graphs add to it.
        self._by_time = timed.time_losses = torch.zeros(2, 4, device=device)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = torch.zeros(len(self._FIELDS), device=self._device)
        self._by_masked: dict[int, Tensor] = {}
        self._by_time.zero_()

    def add(self, loss: Tensor, norm: Tensor, std: Tensor, bad: Tensor, masked: int) -> None:
        """Counts one step; ``bad`` is a bool tensor, ``masked`` the masked share in tenths."""
        both = torch.stack((loss.masked_fill(bad, 0), ~bad))
        self._by_masked[masked] = self._by_masked[masked] + both if masked in self._by_masked else both
        loss_sum, norm_sum, std_sum, good, skipped, streak, longest = self._sums.unbind()
        streak = (streak + 1) * bad
        self._sums = torch.stack(
            (
                loss_sum + both[0],
                norm_sum + norm.masked_fill(bad, 0),
                std_sum + std.masked_fill(bad, 0),
                good + ~bad,
                skipped + bad,
                streak,
                torch.maximum(longest, streak),
            )
        )

    def read(self) -> Averages:
        """Synchronises, returns the means and starts anew (a streak of bad steps goes on); all processes together."""
        by_time = _means(dict(zip(_QUARTERS, self._parallel.total(self._by_time).t().tolist(), strict=True)))
        by_masked = _means({f"{tenths / 10:.1f}": x.tolist() for tenths, x in sorted(self._by_masked.items())})
        self._by_time.zero_()
        self._by_masked = {}
        loss, norm, std, good, skipped, streak, longest = self._sums.tolist()
        count = max(good, 1.0)
        self._sums = self._sums * torch.tensor([0.0] * 5 + [1.0, 0.0], device=self._sums.device)
        return Averages(
            loss / count if good else float("nan"),
            norm / count if good else float("nan"),
            std / count if good else float("nan"),
            int(good + skipped),
            int(skipped),
            int(max(streak, longest)),
            by_time,
            by_masked,
        )


def _means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of (sum, count) pairs; nothing where there is nothing."""
    return {name: total / count for name, (total, count) in sums.items() if count}
