"""One training step: forward, backward, clip, update, average; without a host synchronisation.

A step whose loss or gradient norm is not finite changes nothing: a flag that never leaves the device tells the fused optimizer so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from continuar.backbones.blocks import Block
from continuar.token_model import TokenModel
from continuar.training.config import BaseRun
from continuar.training.ema import EMA
from continuar.training.engines import ENGINES
from continuar.training.meter import Meter
from continuar.training.optim import build_optimizer, learning_rate
from continuar.training.parallel import Single, local, whole
from continuar.training.power_ema import PowerAverages

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

    def __init__(self, model: TokenModel, run: BaseRun, parallel: Single | None = None) -> None:
        self.model, self.run, self.parallel = model.train(), run, parallel or Single()
        self.device = next(model.parameters()).device
        self.slots = self.parallel.slots(run.train.micro_batches)
        precision = run.train.precision
        bf16 = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        self.ema = EMA(model, run.ema)
        self.parallel.shard(self.ema.model)
        self.meter = Meter(model.timed, self.device, self.parallel)
        for block in (m for m in model.modules() if isinstance(m, Block)):
            block.recomputed = run.train.recompute
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
        loop, optim, positions = self.run.train, self.run.optim, self.model.order.positions
        lr = learning_rate(optim, step * loop.batch_size, loop.steps * loop.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.seed(step)
        queried = self.model.draw_queried()
        measured = []
        for number, slot in enumerate(self.slots):
            self.seed(step, slot)
            tokens, labels = stream(step, slot)
            view = self.model.training_view(len(tokens), self.device, queried)
            loss = self._engine(tokens, labels, view, number)
            measured.append(torch.stack((loss, tokens.float().std())))
        means = measured[0] if len(measured) == 1 else torch.stack(measured).mean(0)
        loss, std = self.parallel.mean(means).unbind()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip or float("inf"), foreach=True))
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
