"""Orders: which positions are known when, in training and in generation (paper, Section 3.4 and Table 1).

1. Training: `Order.training_view` takes a permutation per image; its first ``known`` positions are given, the others predicted.
2. Generation: `Order.arrange` makes the permutation from the images' seeds, and `Order.group_sizes` cuts it into steps.
3. An order with ``chooses`` decides during generation instead: it sees the token drawn at every unknown position and chooses
   which of them to keep.

Orders know nothing of networks. `OrderConfig` at the end is the closed table of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from continuar.errors import require
from continuar.noise import Purpose, RowNoise, keyed_permutation


@dataclass(frozen=True)
class View:
    """One teacher-forced view of a batch: positions in the order they become known, and how many are known already.

    Every row has the same number of known tokens, so tensors are rectangular and the loss is computed on queried rows only.

    Attributes:
        order_BN: int64 permutations of 0..N-1.
        known: 0..N-1; the first ``known`` positions of a row are given, the others are to be predicted.
    """

    order_BN: Tensor
    known: int

    @property
    def known_BK(self) -> Tensor:
        """Positions that are given [B, known]."""
        return self.order_BN[:, : self.known]

    @property
    def query_BQ(self) -> Tensor:
        """Positions to be predicted [B, N - known]."""
        return self.order_BN[:, self.known :]


class Order(ABC):
    """Decides positions. Stateless; by default one token per step, arranged beforehand."""

    chooses: bool = False
    """True if `choose` decides during generation which unknown positions come next."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    @abstractmethod
    def training_order(self, batch: int, device: torch.device) -> Tensor:
        """order_BN for training, from torch's default generator of the device."""

    def training_view(self, batch: int, device: torch.device, num_masked: int) -> View:
        """A view for training that predicts the last ``num_masked`` positions of `training_order`."""
        return View(self.training_order(batch, device), self.seq_len - num_masked)

    @abstractmethod
    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        """order_BN for generation: known positions first, then the unknown in the order they are to be generated."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        """The number of tokens that each step predicts: integers >= 1 that sum to ``unknown``.

        Args:
            steps: wanted number of steps, of which at most ``unknown`` are made; None is the order's default.

        Raises:
            UserError: a number of steps the order cannot take.
        """
        allowed = " or ".join(map(str, sorted({unknown, self.seq_len})))
        require(
            steps in (None, unknown, self.seq_len),
            f"steps is {steps}; the order predicts one token per step; allowed: {allowed}, or not given",
        )
        return (1,) * unknown

    def choose(self, size: int, progress: float, log_prob_BQ: Tensor, noise: RowNoise) -> Tensor:
        """The ``size`` of Q candidates that become known, as indices [B, size] into them. Only for orders with ``chooses``.

        Args:
            progress: share of the steps that are done after this one, in (0, 1].
            log_prob_BQ: log-probability of the token drawn at each candidate.
            noise: noise of the B Q candidates, image by image.
        """
        raise TypeError(f"{type(self).__name__} arranges positions beforehand")


def known_first(order_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Moves known positions to the front of each row, otherwise keeping the order."""
    unknown_in_order = (~known_BN).gather(1, order_BN).to(torch.int8)
    return order_BN.gather(1, unknown_in_order.argsort(dim=1, stable=True))


class RasterOrder(Order):
    """Row by row, one token at a time (Table 1, first row). Known positions that are no prefix come first all the same."""

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.arange(self.seq_len, device=device).expand(batch, -1)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(self.training_order(len(known_BN), known_BN.device), known_BN)


class RandomOrder(Order):
    """A fresh permutation per image, one token at a time (Table 1, second and third row)."""

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.rand(batch, self.seq_len, device=device).argsort(dim=1)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(keyed_permutation(seeds_B, self.seq_len), known_BN)


class MAROrder(RandomOrder):
    """Masked autoregression: the next *set* of tokens, in a fresh random order per image (Section 3.4).

    After step s of S, floor(N cos(pi/2 (s+1)/S)) tokens stay unknown (the cosine schedule of MaskGIT, Chang et al. 2022), at least
    one fewer than before and at least one until the last step, which predicts all that is left. S is 64 by default, or N if
    smaller.
    """

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        steps = min(64, self.seq_len) if steps is None else steps
        require(1 <= steps <= self.seq_len, f"steps is {steps}; allowed: 1 to {self.seq_len}, the number of tokens")
        steps = min(steps, unknown)
        left = [unknown]
        for s in range(1, steps):
            # float64: in float32 the floor differs where 3 divides the number of steps.
            target = math.floor(unknown * math.cos(math.pi / 2 * s / steps))
            left.append(max(1, min(left[-1] - 1, target)))
        return tuple(before - after for before, after in zip(left, [*left[1:], 0], strict=True) if before)


class ConfidenceOrder(MAROrder):
    """On-the-fly order: at every step the most probable of all drawn tokens become known (MaskGIT; MAGE, Li et al. 2023; Table 5).

    confidence = log p(token) + choice_temperature (1 - progress) g, with g ~ Gumbel(0, 1): annealed, so that early steps explore.
    Group sizes and training are those of `MAROrder`.
    """

    chooses = True

    def __init__(self, seq_len: int, choice_temperature: float = 4.5) -> None:
        super().__init__(seq_len)
        self.choice_temperature = choice_temperature

    def choose(self, size: int, progress: float, log_prob_BQ: Tensor, noise: RowNoise) -> Tensor:
        uniform = noise.uniform(Purpose.ROUTE, 0, 1).view_as(log_prob_BQ)
        # float32's largest value below 1 keeps the outer logarithm finite.
        gumbel = -(-uniform.clamp(max=1 - 2.0**-24).log()).log()
        confidence = log_prob_BQ + self.choice_temperature * (1 - progress) * gumbel
        return confidence.topk(size, dim=1).indices


@dataclass(frozen=True)
class OrderTraits:
    """What an order asks of the other parts, so that parts that cannot work together are refused before anything is built."""

    max_group: ClassVar[int | None] = None
    """The most tokens a step predicts; None: no limit."""
    fixed: ClassVar[bool] = False
    """True if every image has the same order, so that the known tokens are always a prefix."""
    needs_log_prob: ClassVar[bool] = False
    """True if the order needs the probability of the drawn tokens."""


@dataclass(frozen=True)
class RasterOrderConfig(OrderTraits):
    """Row by row, one token at a time; for causal backbones."""

    kind: Literal["raster"] = "raster"
    max_group: ClassVar[int | None] = 1
    fixed: ClassVar[bool] = True

    def build(self, seq_len: int) -> RasterOrder:
        return RasterOrder(seq_len)


@dataclass(frozen=True)
class RandomOrderConfig(OrderTraits):
    """A fresh permutation per image, one token at a time."""

    kind: Literal["random"] = "random"
    max_group: ClassVar[int | None] = 1

    def build(self, seq_len: int) -> RandomOrder:
        return RandomOrder(seq_len)


@dataclass(frozen=True)
class MAROrderConfig(OrderTraits):
    """Random order in groups that grow by a cosine; the paper's default."""

    kind: Literal["mar"] = "mar"

    def build(self, seq_len: int) -> MAROrder:
        return MAROrder(seq_len)


@dataclass(frozen=True)
class ConfidenceOrderConfig(OrderTraits):
    """The most probable tokens first, in groups that grow by a cosine; needs a head with probabilities."""

    kind: Literal["confidence"] = "confidence"
    choice_temperature: float = 4.5
    """Scale of the Gumbel noise on the confidence before the first step; it falls linearly to 0. MaskGIT: 4.5, MAGE: 6."""
    needs_log_prob: ClassVar[bool] = True

    def __post_init__(self) -> None:
        value = self.choice_temperature
        require(0 <= value < float("inf"), f"order.choice_temperature is {value}; allowed: 0 or more, finite")

    def build(self, seq_len: int) -> ConfidenceOrder:
        return ConfidenceOrder(seq_len, self.choice_temperature)


OrderConfig = MAROrderConfig | RandomOrderConfig | RasterOrderConfig | ConfidenceOrderConfig
"""The closed table of orders."""
