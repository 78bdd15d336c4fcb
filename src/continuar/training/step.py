"""One training step of a model: forward, backward, clip, update, average; without a host synchronisation.

1. All draws of a step follow from (seed, step), and those of a micro-batch from (seed, step, micro-batch).
2. Each micro-batch goes through forward and backward (`training.engines`), which leaves gradients.
3. The gradient norm is clipped, and AdamW and the averages of the weights are updated. If the loss or the norm is not finite, a
   flag that never leaves the device makes the fused kernels skip both updates.
4. Losses are summed on the device (`Meter`) and read only when metrics are written.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from continuar.distributed import SingleProcess, gathered, local
from continuar.heads.base import LossByTimestep
from continuar.models.base import TokenModel
from continuar.models.transformer import Block
from continuar.tensors import lerp_unless_
from continuar.training.config import BaseRun, EMAConfig, OptimConfig
from continuar.training.engines import ENGINES
from continuar.training.power_ema import PowerAverages

QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")
"""Quarters of the time of diffusion or flow, 0 (no noise, or a flow's beginning) to 1."""


def seed_draws(seed: int, step: int, part: int | None = None, rollbacks: int = 0) -> None:
    """Makes what torch's default generators draw next a function of the arguments."""
    name = f"{seed}/{step}" + ("" if part is None else f"/{part}") + (f"#{rollbacks}" if rollbacks else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """True if a run of this ``train.precision`` uses bfloat16 autocast on the device."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def build_optimizer(model: TokenModel, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and the head (paper, Appendix B)."""
    decayed, others = model.parameter_groups()
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Only the fused kernel can skip a step by a flag on the device.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimConfig, images: int, total_images: int) -> float:
    """The learning rate of the step that begins after ``images`` images of a run of ``total_images``."""
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of all groups; in place where a CUDA graph reads it from a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def update_weights(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], loss: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Clips gradients to a norm of ``clip`` (0: not) and steps; (gradient norm, bad).

    If the loss or the norm is not finite, ``bad`` is True, and neither weights nor moments change. Both stay on the device.
    """
    norm = gathered(torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf"), foreach=True))
    bad = ~(loss + norm).isfinite()
    # The fused kernel reads this flag as gradient scaling sets it, and changes nothing if it is 1.
    setattr(optimizer, "found_inf", bad.float())  # noqa: B010 (an attribute AdamW reads but does not declare)
    optimizer.step()
    return norm, bad


def all_finite(tensors: list[Tensor], parallel: SingleProcess) -> bool:
    """True if these tensors are finite in all processes; waits for the device."""
    return not parallel.any(not torch.nn.utils.get_total_norm(tensors).isfinite())


class EMA:
    """Exponential moving average of a model's weights, in float32. ``model`` is the average: sample with it, save it.

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
        # Made at the first update, because sharding replaces the parameters.
        with torch.no_grad():
            return [local(p) for p in self.model.parameters()], [local(p) for p in self._source_model.parameters()]

    def decay(self, step: int) -> float:
        """The decay of the update after optimizer step ``step`` (0-based)."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    def update(self, step: int, bad: Tensor | None = None) -> None:
        """average += (1 - decay) (weights - average), unless ``bad``, a bool tensor."""
        lerp_unless_(*self._pairs, 1 - self.decay(step), bad)


@dataclass(frozen=True)
class Averages:
    """Means over the steps since the last read."""

    means: dict[str, float]
    """NaN where every step was bad."""
    steps: int
    skipped: int
    bad_in_a_row: int
    """The longest streak of bad steps, counted on from before the last read."""


class Meter:
    """Sums of named scalars on the device, read on the host only when metrics are written.

    Args:
        device: holds the sums.
        parallel: the processes that train together.
        loss_by_timestep: the part of a model whose losses by time are counted too.
    """

    def __init__(self, device: torch.device, parallel: SingleProcess, loss_by_timestep: LossByTimestep | None = None) -> None:
        self._device, self._parallel = device, parallel
        self._by_time = torch.zeros(2, len(QUARTERS), device=device)
        if loss_by_timestep is not None:
            loss_by_timestep.time_losses = self._by_time  # the same tensor for ever: CUDA graphs add to it
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._parts: dict[tuple[str, ...], Tensor] = {}
        self._steps = 0
        self._skipped = self._streak = self._longest = torch.zeros((), device=self._device)
        self._by_time.zero_()

    def add(self, bad: Tensor, values: Mapping[str, Tensor], parts: Mapping[str, Tensor] | None = None) -> None:
        """Counts one step; the values of a bad one are left out.

        Args:
            bad: a bool tensor.
            values: 0-d tensors by name.
            parts: the same, of values that only some steps have.
        """
        for sums, group in ((self._sums, values), (self._parts, parts or {})):
            if group:
                stacked = torch.stack([value.detach().float() for value in group.values()]).masked_fill(bad, 0)
                counted = torch.cat((stacked, (~bad).float().view(1)))
                names = tuple(group)
                sums[names] = sums[names] + counted if names in sums else counted
        self._steps += 1
        self._skipped = self._skipped + bad
        self._streak = (self._streak + 1) * bad
        self._longest = torch.maximum(self._longest, self._streak)

    def read(self) -> Averages:
        """Synchronises, returns the means and starts anew; all processes together."""
        counts = torch.stack((self._skipped, self._longest))
        # All processes skip the same steps, so counts are their own means.
        numbers = self._parallel.mean(torch.cat([*self._sums.values(), *self._parts.values(), counts])).tolist()
        by_time = self._parallel.total(self._by_time).t().tolist()
        means: dict[str, tuple[float, float]] = {}
        for names in (*self._sums, *self._parts):
            *values, count = numbers[: len(names) + 1]
            del numbers[: len(names) + 1]
            for name, value in zip(names, values, strict=True):
                total, steps = means.get(name, (0.0, 0.0))
                means[name] = total + value, steps + count
        parts = {name for names in self._parts for name in names}
        means |= {f"loss_by_time/{quarter}": (total, count) for quarter, (total, count) in zip(QUARTERS, by_time, strict=True)}
        shown = {
            name: total / count if count else math.nan
            for name, (total, count) in means.items()
            if count or not (name in parts or name.startswith("loss_by_time/"))
        }
        steps, streak = self._steps, self._streak
        self.reset()
        self._streak = self._longest = streak
        return Averages(shown, steps, int(numbers[0]), int(numbers[1]))


Stream = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, number of a micro-batch in the step's batch) -> tokens and labels, drawn from torch's default generators."""


class TrainStep:
    """A model with its optimizer and its averages.

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
        self._total_images = run.train.steps * run.train.batch_size
        self.ema = EMA(model, run.ema)
        self.parallel.shard(self.ema.model)
        self.meter = Meter(self.device, self.parallel, model.loss_by_timestep)
        for block in (m for m in model.modules() if isinstance(m, Block)):
            block.activation_checkpointing = run.train.activation_checkpointing
        bf16 = uses_bf16(run.train.precision, self.device)
        self._engine = ENGINES[run.train.engine](model, run.train.label_dropout, bf16, self.parallel, len(self.slots))
        # After the engine, which may have sharded the parameters.
        self.optimizer = build_optimizer(model, run.optim)
        self.averages = PowerAverages(model, run.ema)

    def seed(self, step: int, slot: int | None = None) -> None:
        """Makes every draw of a micro-batch (order, dropout, timesteps, noise, augmentation) a function of (seed, step, slot), and
        the number of masked tokens, which is drawn without a slot, one of (seed, step)."""
        seed_draws(self.run.seed, step, slot, self.rollbacks)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.run.optim, step * self.run.train.batch_size, self._total_images)

    def __call__(self, step: int, stream: Stream) -> None:
        """Takes step ``step`` on the batches that ``stream`` gives."""
        set_learning_rate(self.optimizer, self.rate(step))
        self.seed(step)
        masked = self.model.sample_num_masked()  # the same for all micro-batches, so that losses are plain means over them
        measured = []
        for number, slot in enumerate(self.slots):
            self.seed(step, slot)
            tokens, labels = stream(step, slot)
            view = self.model.order.training_view(len(tokens), self.device, masked)
            loss = self._engine(tokens, labels, view, number)
            measured.append(torch.stack((loss, tokens.float().std())))
        means = measured[0] if len(measured) == 1 else torch.stack(measured).mean(0)
        loss, std = self.parallel.mean(means).unbind()
        norm, bad = update_weights(self.optimizer, self.model.parameters(), loss, self.run.optim.clip)
        self.ema.update(step, bad)
        if self.averages.tensors:
            self.averages.update(step, bad)
        tenths = 10 * masked // self.model.order.seq_len
        values = {"loss": loss, "gradient_norm": norm, "token_std": std}
        self.meter.add(bad, values, {f"loss_by_masked/{tenths / 10:.1f}": loss})

    def finite(self) -> bool:
        """True if weights and averages are finite in all processes; waits for the device."""
        return all_finite([local(p.detach()) for model in (self.model, self.ema.model) for p in model.parameters()], self.parallel)
