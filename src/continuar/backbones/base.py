"""What a backbone is: known tokens and a condition -> one condition vector z per queried position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor, nn

from continuar.orders import View

State = TypeVar("State")


class Backbone(nn.Module, ABC, Generic[State]):
    """Knows nothing of heads or of what its inputs embed. E is the width of embedded tokens and conditions, Z of its output.

    Attributes:
        width: E. z_dim: Z. condition_tokens: how many condition vectors C it takes, besides 1 (which it may repeat).
        max_group: the most tokens it can predict at once, or None for no limit.
    """

    width: int
    z_dim: int
    max_group: int | None = None

    @abstractmethod
    def forward(self, x_BNE: Tensor, cond_BCE: Tensor, view: View) -> Tensor:
        """Teacher-forced z [B, Q, Z] of ``view.query_BQ``, given the embedded tokens of all positions (only the known are read)."""

    @abstractmethod
    def start(self, cond_BCE: Tensor, positions: int) -> State:
        """The state of a generation of ``positions`` tokens in which nothing is known yet."""

    @abstractmethod
    def predict(self, state: State, query_BQ: Tensor) -> Tensor:
        """z [B, Q, Z] at positions that are not known yet."""

    @abstractmethod
    def commit(self, state: State, index_BK: Tensor, x_BKE: Tensor) -> None:
        """From now on these positions are known, with these embedded tokens."""
