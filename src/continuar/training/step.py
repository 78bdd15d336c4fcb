"""AdamW with the paper's parameter groups, and the learning rate as a function of images seen.

The exponential moving average of a model's weights, kept as a second model in float32.

What is measured while training: sums on the device, read on the host only when metrics are written.

One training step: forward, backward, clip, update, average; without a host synchronisation.

A step whose loss or gradient norm is not finite changes nothing: a flag that never leaves the device tells the fused optimizer so.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from continuar.distributed import SingleProcess, gathered, local
from continuar.heads.base import LossByTimestep
from continuar.models.base import TokenModel
from continuar.models.transformer import Block
from continuar.training.config import BaseRun, EMAConfig, OptimConfig
from continuar.training.engines import ENGINES
from continuar.training.power_ema import PowerAverages


def build_optimizer(model: TokenModel, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and the head. Fused: it can skip a step on the device, without a host read."""
    decayed, others = model.parameter_groups()
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimConfig, images: int, total_images: int) -> float:
    """The rate for the step that begins after ``images`` images of a run of ``total_images``."""
    if images < config.warmup_images:
        return config.lr * images / config.warmup_images
    if config.decay == "constant":
        return config.lr
    start = config.warmup_images
    if config.decay == "linear" and config.decay_images:
        start = max(start, total_images - config.decay_images)
    progress = min(1.0, max(0.0, (images - start) / max(1, total_images - start)))
    falling = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)


class EMA:
    """``model`` is the average: sample with it, save it.

    Args:
        source: the model that trains; both may be sharded after this and before the first update.
        config: decay and warm-up.
    """

    def __init__(self, source: TokenModel, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        self._source_model = source

    @cached_property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(average, source): this process's parts, which share the parameters' memory."""
        with torch.no_grad():
            return [local(p) for p in self.model.parameters()], [local(p) for p in self._source_model.parameters()]

    def decay(self, step: int) -> float:
        """The decay of the update after optimizer step ``step`` (0-based)."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay)(weights - average), in one multi-tensor call."""
        get_ema_multi_avg_fn(self.decay(step))(*self._pairs, step)


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

    def __init__(self, loss_by_timestep: LossByTimestep, device: torch.device, parallel: SingleProcess) -> None:
        self._device, self._parallel = device, parallel
        # One tensor for ever: CUDA graphs add to it.
        self._by_time = loss_by_timestep.time_losses = torch.zeros(2, 4, device=device)
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


Stream = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, number of a micro-batch in the step's batch) -> tokens and labels, drawn from torch's default generators."""


class TrainStep:
    """Owns the optimizer and the average of a model.

    Args:
        model: on its device, in training mode from here on; sharded from here on where ``parallel`` shards.
        run: the run's config, whose micro-batch is decided.
        parallel: the processes that train together; one if not given.

    Attributes:
        rollbacks: how often the run went back to a checkpoint; each time all draws become others.
    """

    rollbacks = 0

    def __init__(self, model: TokenModel, run: BaseRun, parallel: SingleProcess | None = None) -> None:
        self.model, self.run, self.parallel = model.train(), run, parallel or SingleProcess()
        self.device = next(model.parameters()).device
        self.slots = self.parallel.slots(run.train.micro_batches)
        precision = run.train.precision
        bf16 = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        self.ema = EMA(model, run.ema)
        self.parallel.shard(self.ema.model)
        self.meter = Meter(model.loss_by_timestep, self.device, self.parallel)
        for block in (m for m in model.modules() if isinstance(m, Block)):
            block.recomputed = run.train.activation_checkpointing
        engine = ENGINES[run.train.engine]
        self._engine = engine(model, run.train.label_dropout, bf16, self.parallel, len(self.slots))
        self.optimizer = build_optimizer(model, run.optim)
        self.averages = PowerAverages(model, run.ema)

    def seed(self, step: int, slot: int | None = None) -> None:
        """Makes every draw of a micro-batch (order, dropout, timesteps, noise, augmentation) a function of (seed, step, slot), and
        the number of masked tokens, which is drawn without a slot, one of (seed, step)."""
        name = f"{self.run.seed}/{step}" if slot is None else f"{self.run.seed}/{step}/{slot}"
        name += f"#{self.rollbacks}" if self.rollbacks else ""
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def __call__(self, step: int, stream: Stream) -> None:
        """Step ``step`` on the batches that ``stream`` gives."""
        loop, optim, positions = self.run.train, self.run.optim, self.model.order.seq_len
        lr = learning_rate(optim, step * loop.batch_size, loop.steps * loop.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.seed(step)
        queried = self.model.sample_num_masked()
        measured = []
        for number, slot in enumerate(self.slots):
            self.seed(step, slot)
            tokens, labels = stream(step, slot)
            view = self.model.training_view(len(tokens), self.device, queried)
            loss = self._engine(tokens, labels, view, number)
            measured.append(torch.stack((loss, tokens.float().std())))
        means = measured[0] if len(measured) == 1 else torch.stack(measured).mean(0)
        loss, std = self.parallel.mean(means).unbind()
        norm = gathered(torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip or float("inf"), foreach=True))
        bad = ~(loss + norm).isfinite()
        # The fused kernel reads this flag as gradient scaling does, and leaves weights and moments alone if it is 1.
        setattr(self.optimizer, "found_inf", bad.float())  # noqa: B010 (an attribute AdamW reads but does not declare)
        self.optimizer.step()
        self.ema.update(step)
        self.averages.update(step)
        self.meter.add(loss, norm, std, bad, masked=10 * queried // positions)

    def finite(self) -> bool:
        """Whether the weights and averages of all processes are finite numbers; waits for the device."""
        tensors = [local(p.detach()) for model in (self.model, self.ema.model) for p in model.parameters()]
        return not self.parallel.any(not torch.nn.utils.get_total_norm(tensors).isfinite())
