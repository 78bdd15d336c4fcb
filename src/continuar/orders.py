"""What an order is: which positions are known when, in training and in generation.

An order's config says what it asks of the other parts, so that pairs which cannot work are refused before anything is built:

* ``max_group``: the most tokens a step predicts at once, or None for no limit.
* ``fixed``: every image has the same order, so that what is known is always a prefix.
* ``needs_log_prob``: positions are chosen by the probability of what the head drew there.

Raster order: row by row, one token at a time (paper, Table 1, first row).

Random order, one token at a time, a fresh permutation per image (paper, Table 1, second and third row).

Masked autoregression: the next *set* of tokens, in a fresh random order per image (paper, Section 3.4).

After step s of S, floor(N cos(pi/2 (s+1)/S)) tokens stay unknown (MaskGIT's cosine schedule, Chang et al. 2022), at least one fewer
than before and at least one until the last step, which predicts all that is left.

On-the-fly order: at every step the positions whose drawn tokens are most probable become known.

MaskGIT (Chang et al. 2022), MAGE (Li et al. 2023); the paper's Table 5:

1. A token is drawn at every unknown position.
2. confidence = log p(token) + choice_temperature (1 - progress) g, with g ~ Gumbel(0, 1): annealed, so that early steps explore.
3. The most confident positions, as many as the step's group (sizes as in `mar`), keep their tokens; the others are drawn anew.

All tokens of an image at once, as models have it that know no order.
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

    Every row has the same number of known tokens, so tensors are rectangular and loss is computed on the queried rows alone.

    Attributes:
        order_BN: int64 permutations of 0..N-1.
        known: 0..N-1; the first ``known`` entries of a row are given, the others are to be predicted.
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
    """Decides positions; knows nothing of networks. Stateless."""

    chooses: bool = False
    """Whether `choose` decides during generation which of all unknown positions come next; else `arrange` has decided before it."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    @abstractmethod
    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        """How many tokens each step predicts: host integers >= 1 that sum to ``unknown``.

        Args:
            steps: as asked for, at most ``unknown`` of them are made; None is the order's default.

        Raises:
            UserError: a number of steps the order cannot take.
        """

    @abstractmethod
    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        """order_BN for generation: known positions first, then the unknown in the order they are to be generated."""

    @abstractmethod
    def training_order(self, batch: int, device: torch.device) -> Tensor:
        """order_BN for training, from torch's default generator of the device."""

    def choose(self, size: int, progress: float, log_prob_BQ: Tensor, noise: RowNoise) -> Tensor:
        """Which ``size`` of Q candidates become known: indices [B, size] into them. Only of orders that choose.

        Args:
            progress: the share of the generation's steps that are done after this one, in (0, 1].
            log_prob_BQ: of the token drawn at each candidate.
            noise: of the B Q candidates, image by image.
        """
        raise TypeError(f"{type(self).__name__} arranges positions beforehand")


def one_by_one(steps: int | None, unknown: int, seq_len: int) -> tuple[int, ...]:
    """Groups of one token.

    Raises:
        UserError: steps other than one per token.
    """
    allowed = sorted({unknown, seq_len})
    require(
        steps is None or steps in allowed,
        f"steps is {steps}; the order predicts one token per step; allowed: {' or '.join(map(str, allowed))}, or not given",
    )
    return (1,) * unknown


def known_first(order_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Moves known positions to the front of each row, otherwise keeping the order."""
    unknown_in_order = (~known_BN).gather(1, order_BN).to(torch.int8)
    return order_BN.gather(1, unknown_in_order.argsort(dim=1, stable=True))


@dataclass(frozen=True)
class RasterOrderConfig:
    """Row by row, one token at a time; for causal backbones."""

    kind: Literal["raster"] = "raster"
    max_group: ClassVar[int | None] = 1
    fixed: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = False

    def build(self, seq_len: int) -> RasterOrder:
        """The order over ``positions`` tokens."""
        return RasterOrder(seq_len)


class RasterOrder(Order):
    """See the module's docstring. Known positions that are not a prefix come first all the same, and the rest in raster order."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        return one_by_one(steps, unknown, self.seq_len)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(self.training_order(len(known_BN), known_BN.device), known_BN)

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.arange(self.seq_len, device=device).expand(batch, -1)


@dataclass(frozen=True)
class RandomOrderConfig:
    """A fresh permutation per image, one token at a time."""

    kind: Literal["random"] = "random"
    max_group: ClassVar[int | None] = 1
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = False

    def build(self, seq_len: int) -> RandomOrder:
        """The order over ``positions`` tokens."""
        return RandomOrder(seq_len)


class RandomOrder(Order):
    """See the module's docstring."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        return one_by_one(steps, unknown, self.seq_len)

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return known_first(keyed_permutation(seeds_B, self.seq_len), known_BN)

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.rand(batch, self.seq_len, device=device).argsort(dim=1)


DEFAULT_STEPS = 64


@dataclass(frozen=True)
class MAROrderConfig:
    """Random order in groups that grow by a cosine; the paper's default."""

    kind: Literal["mar"] = "mar"
    max_group: ClassVar[int | None] = None
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = False

    def build(self, seq_len: int) -> MAROrder:
        """The order over ``positions`` tokens."""
        return MAROrder(seq_len)


class MAROrder(RandomOrder):
    """See the module's docstring. 64 steps unless said otherwise, or one per token where there are fewer."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        steps = min(DEFAULT_STEPS, self.seq_len) if steps is None else steps
        require(1 <= steps <= self.seq_len, f"steps is {steps}; allowed: 1 to {self.seq_len}, the number of tokens")
        steps = min(steps, unknown)
        sizes: list[int] = []
        left = unknown
        for s in range(steps):
            last = s == steps - 1
            # float64: in float32 the floor differs where 3 divides the number of steps.
            target = 0 if last else math.floor(unknown * math.cos(math.pi / 2 * (s + 1) / steps))
            after = 0 if last else max(1, min(left - 1, target))
            sizes.append(left - after)
            left = after
        return tuple(sizes)


@dataclass(frozen=True)
class ConfidenceOrderConfig:
    """The most probable tokens first, in groups that grow by a cosine; needs a head with probabilities."""

    kind: Literal["confidence"] = "confidence"
    choice_temperature: float = 4.5
    """Scale of the Gumbel noise on the confidence before the first step; it falls linearly to 0. MaskGIT: 4.5, MAGE: 6."""
    max_group: ClassVar[int | None] = None
    fixed: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = True

    def __post_init__(self) -> None:
        value = self.choice_temperature
        require(0 <= value < float("inf"), f"order.choice_temperature is {value}; allowed: 0 or more, finite")

    def build(self, seq_len: int) -> ConfidenceOrder:
        """The order over ``positions`` tokens."""
        return ConfidenceOrder(seq_len, self.choice_temperature)


class ConfidenceOrder(MAROrder):
    """See the module's docstring. Training is that of `mar`: random positions are unknown."""

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


class SingleStepOrder(Order):
    """One step that predicts every token. Nothing can be known beforehand."""

    def group_sizes(self, steps: int | None, unknown: int) -> tuple[int, ...]:
        require(
            steps in (None, 1),
            f"steps is {steps}; the model makes all tokens of an image in one; allowed: 1, or not given (but see diffusion_steps)",
        )
        known = self.seq_len - unknown
        require(unknown in (0, self.seq_len), f"{known} tokens are known; the model makes whole images; allowed: none, or all")
        return (unknown,) if unknown else ()

    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        return self.training_order(len(known_BN), known_BN.device)

    def training_order(self, batch: int, device: torch.device) -> Tensor:
        return torch.arange(self.seq_len, device=device).expand(batch, -1)


OrderConfig = MAROrderConfig | RandomOrderConfig | RasterOrderConfig | ConfidenceOrderConfig
"""The closed table of orders."""
