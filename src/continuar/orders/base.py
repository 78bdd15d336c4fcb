"""What an order is: which positions are known when, in training and in generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def __init__(self, positions: int) -> None:
        self.positions = positions

    @abstractmethod
    def group_sizes(self, steps: int, unknown: int) -> tuple[int, ...]:
        """How many tokens each step predicts: host integers >= 1 that sum to ``unknown``."""

    @abstractmethod
    def arrange(self, known_BN: Tensor, seeds_B: Tensor) -> Tensor:
        """order_BN for generation: known positions first, then the unknown in the order they are to be generated."""

    @abstractmethod
    def training_view(self, batch: int, device: torch.device) -> View:
        """A random view from torch's default generators; the number of known tokens is drawn on the host."""

    @abstractmethod
    def masked_counts(self) -> dict[int, float]:
        """Every number of predicted tokens that a training view can have, with its probability."""

    def mean_masked(self) -> float:
        """Expected number of predicted tokens per training image, for FLOP counts."""
        return sum(count * share for count, share in self.masked_counts().items())


def known_first(order_BN: Tensor, known_BN: Tensor) -> Tensor:
    """Moves known positions to the front of each row, otherwise keeping the order."""
    unknown_in_order = (~known_BN).gather(1, order_BN).to(torch.int8)
    return order_BN.gather(1, unknown_in_order.argsort(dim=1, stable=True))
