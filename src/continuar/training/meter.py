"""What is measured while training: sums on the device, read on the host only when metrics are written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Averages:
    """Means over the steps since the last read."""

    loss: float
    gradient_norm: float
    token_std: float
    steps: int
    skipped: int
    bad_in_a_row: int


class Meter:
    """Sums on the device; see the module's docstring."""

    _FIELDS = ("loss", "norm", "std", "good", "skipped", "streak", "longest")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = torch.zeros(len(self._FIELDS), device=self._device)

    def add(self, loss: Tensor, norm: Tensor, std: Tensor, bad: Tensor) -> None:
        """Counts one step; ``bad`` is a bool tensor."""
        loss_sum, norm_sum, std_sum, good, skipped, streak, longest = self._sums.unbind()
        streak = (streak + 1) * bad
        self._sums = torch.stack(
            (
                loss_sum + loss.masked_fill(bad, 0),
                norm_sum + norm.masked_fill(bad, 0),
                std_sum + std.masked_fill(bad, 0),
                good + ~bad,
                skipped + bad,
                streak,
                torch.maximum(longest, streak),
            )
        )

    def read(self) -> Averages:
        """Synchronises, returns the means and starts anew (a streak of bad steps goes on)."""
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
        )
