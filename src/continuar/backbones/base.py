"""What a backbone is: known tokens and a condition -> one condition vector z per queried position.

A backbone's config says what it asks of an order: ``max_group``, the most tokens it can predict at once (None: no limit), and
``masked``, whether it is trained on randomly masked tokens and so needs an order that is random too; and of a condition:
``max_condition``, the most condition tokens it takes (None: no limit).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor, nn

from continuar.orders import View

State = TypeVar("State")


class Backbone(nn.Module, ABC, Generic[State]):
    """Knows nothing of heads or of what its inputs embed. E is the width of embedded tokens and conditions, Z of its output.

    Attributes:
        width: E. z_dim: Z.
    """

    width: int
    z_dim: int

    @abstractmethod
    def forward(self, x_BNE: Tensor, cond_BCE: Tensor, view: View) -> Tensor:
        """Teacher-forced z [B, Q, Z] of ``view.query_BQ``, given the embedded tokens of all positions.

        A bidirectional backbone reads the known tokens alone; a causal one also reads, for each queried position, the queried
        tokens before it.
        """

    @abstractmethod
    def draw_queried(self) -> int:
        """How many tokens the next training view predicts, 1..N: a host integer, from torch's default generator of the CPU."""

    @abstractmethod
    def queried_counts(self) -> dict[int, float]:
        """Every number that `draw_queried` can give, with its probability: the shapes training will see."""

    @abstractmethod
    def start(self, cond_BCE: Tensor, positions: int) -> State:
        """The state of a generation of ``positions`` tokens in which nothing is known yet: buffers of fixed size."""

    @abstractmethod
    def predict(self, state: State, query_BQ: Tensor) -> Tensor:
        """z [B, Q, Z] at positions that are not known yet."""

    @abstractmethod
    def commit(self, state: State, index_BK: Tensor, x_BKE: Tensor) -> None:
        """From now on these positions are known, with these embedded tokens.

        After `predict`, they are among the positions that were queried; without it, any (the tokens given at the start).
        """

    def position_tables(self) -> dict[str, int]:
        """Parameters with a row for every token of the grid, interpolated for another grid, and how many rows come before those."""
        return {}
