"""What an order is: which positions are known when, in training and in generation.

An order's config says what it asks of the other parts, so that pairs which cannot work are refused before anything is built:

* ``max_group``: the most tokens a step predicts at once, or None for no limit.
* ``fixed``: every image has the same order, so that what is known is always a prefix.
* ``needs_log_prob``: positions are chosen by the probability of what the head drew there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from continuar.errors import require
from continuar.noise import RowNoise


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

    def __init__(self, positions: int) -> None:
        self.positions = positions

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


def one_by_one(steps: int | None, unknown: int, positions: int) -> tuple[int, ...]:
    """Groups of one token.

    Raises:
        UserError: steps other than one per token.
    """
    allowed = sorted({unknown, positions})
    require(
        steps is None or steps in allowed,
        f"steps is {steps}; the order predicts one token per step; allowed: {' or '.join(map(str, allowed))}, or not given",
    )
    return (1,) * unknown


def known_first(order_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Moves known positions to the front of each row, otherwise keeping the order."""
    unknown_in_order = (~known_BN).gather(1, order_BN).to(torch.int8)
    return order_BN.gather(1, unknown_in_order.argsort(dim=1, stable=True))
