"""One training step: forward, backward, clip, update, average; without a host synchronisation.

A step whose loss or gradient norm is not finite changes nothing: a flag that never leaves the device tells the fused optimizer so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from continuar.model import Model
from continuar.training.config import Run
from continuar.training.ema import EMA
from continuar.training.engines import ENGINES
from continuar.training.optim import build_optimizer, learning_rate


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
    """Sums on the device; read on the host only when metrics are written."""

    _FIELDS = ("loss", "norm", "std", "good", "skipped", "streak", "longest")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self._FIELDS), device=device)

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


class TrainStep:
    """Owns the optimizer and the average of a model.

    Args:
        model: on its device, in training mode from here on.
        run: the run's config.
    """

    def __init__(self, model: Model, run: Run) -> None:
        self.model, self.run = model.train(), run
        self.optimizer = build_optimizer(model, run.optim)
        self.ema = EMA(model, run.ema)
        self.device = next(model.parameters()).device
        self.meter = Meter(self.device)
        precision = run.train.precision
        bf16 = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        self._engine = ENGINES[run.train.engine](model, run.train.label_dropout, bf16)

    def seed(self, step: int) -> None:
        """Makes every draw of a step (view, dropout, timesteps, noise, augmentation) a function of (seed, step)."""
        digest = hashlib.blake2b(f"{self.run.seed}/{step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def __call__(self, step: int, tokens: Tensor, labels_B: Tensor) -> None:
        """Step ``step`` on one batch; call `seed` before the batch is drawn."""
        loop, optim = self.run.train, self.run.optim
        lr = learning_rate(optim, step * loop.batch_size, loop.steps * loop.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        view = self.model.training_view(len(tokens), self.device)
        loss = self._engine(tokens, labels_B, view)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip or float("inf"), foreach=True)
        bad = ~(loss + norm).isfinite()
        # The fused kernel reads this flag as gradient scaling does, and leaves weights and moments alone if it is 1.
        setattr(self.optimizer, "found_inf", bad.float())  # noqa: B010 (an attribute AdamW reads but does not declare)
        self.optimizer.step()
        self.ema.update(step)
        self.meter.add(loss, norm, tokens.float().std(), bad)
