"""Interfaces of models: `TokenModel`, a model of an image's tokens as training and pipelines see it, and `Backbone`, the part of it
that turns known tokens and a condition into one condition vector z per queried position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from continuar.errors import require
from continuar.heads.base import Head, LossByTimestep
from continuar.models.positions import Positions
from continuar.models.transformer import Block
from continuar.orders import Order, View


class TokenModel(nn.Module, ABC):
    """Tokens and their condition -> loss. B images, N tokens, Q queried. Tokens are [B, N, D] or ids [B, N].

    Attributes:
        config: the frozen config that builds it.
        order: which positions a step of generation predicts.
        null_label: the label that stands for "no class".
    """

    config: Any
    order: Order
    null_label: int

    @property
    @abstractmethod
    def loss_by_timestep(self) -> LossByTimestep:
        """The part whose losses by time training logs."""

    @abstractmethod
    def num_masked_distribution(self) -> dict[int, float]:
        """Every number that `sample_num_masked` can give, with its probability: the shapes training will see."""

    @abstractmethod
    def sample_num_masked(self) -> int:
        """The number of tokens the next training view predicts, 1..N: a host integer, from torch's default generator of the CPU."""

    @abstractmethod
    def loss(self, tokens: Tensor, condition: Tensor | None, view: View, condition_dropout: float = 0.0) -> Tensor:
        """The loss of every predicted token, [B, Q].

        Args:
            tokens: [B, N, D] of about unit std, or ids [B, N].
            condition: int64 labels [B], or vectors [B, C, dim], depending on the model's condition; None: null for all images.
            view: which tokens are known and which are predicted.
            condition_dropout: the probability with which a row's condition is replaced by the null condition (paper: 0.1).
        """

    @abstractmethod
    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(with, without) weight decay."""

    @abstractmethod
    def compiled_parts(self) -> Iterator[nn.Module]:
        """The parts that training compiles, each by itself: parts of equal shape share one compilation."""

    def shard_units(self) -> Iterator[tuple[list[nn.Module], bool]]:
        """(modules, low) for each group of modules that FSDP gathers together (`continuar.distributed.Shardable`)."""
        for module in self.modules():
            if isinstance(module, Block):
                yield [module.attention, module.mlp], True
            elif isinstance(module, Head):
                yield [module], False

    def training_view(self, batch: int, device: torch.device, num_masked: int | None = None) -> View:
        """A random view of ``num_masked`` predicted tokens, by default a random number, from torch's default generators."""
        return self.order.training_view(batch, device, self.sample_num_masked() if num_masked is None else num_masked)

    def mean_num_masked(self) -> float:
        """Expected number of predicted tokens per training image, for FLOP counts."""
        return sum(count * share for count, share in self.num_masked_distribution().items())


def parameter_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(part, parameters) of each direct child, for tables."""
    for name, child in model.named_children():
        yield name, sum(p.numel() for p in child.parameters())


State = TypeVar("State")


class Backbone(nn.Module, ABC, Generic[State]):
    """Embedded tokens and condition -> z; independent of heads. E is the width of embedded tokens and conditions, Z of z.

    Law: `predict` after `commit` equals the teacher-forced `forward`.

    Attributes:
        width: E. z_dim: Z.
    """

    width: int
    z_dim: int

    @abstractmethod
    def forward(self, x_BNE: Tensor, cond_BCE: Tensor, view: View) -> Tensor:
        """Teacher-forced z [B, Q, Z] of ``view.query_BQ``, given the embedded tokens of all positions.

        A bidirectional backbone reads only the known tokens; a causal one also reads, for each queried position, the queried tokens
        before it.
        """

    @abstractmethod
    def sample_num_masked(self) -> int:
        """See `TokenModel.sample_num_masked`."""

    @abstractmethod
    def num_masked_distribution(self) -> dict[int, float]:
        """Every number that `sample_num_masked` can give, with its probability."""

    @abstractmethod
    def start(self, cond_BCE: Tensor, seq_len: int) -> State:
        """The state of a generation of ``seq_len`` tokens in which nothing is known yet: buffers of fixed size."""

    @abstractmethod
    def predict(self, state: State, query_BQ: Tensor) -> Tensor:
        """z [B, Q, Z] at positions that are not known yet."""

    @abstractmethod
    def commit(self, state: State, index_BK: Tensor, x_BKE: Tensor) -> None:
        """Makes these positions known, with these embedded tokens.

        After `predict`, they are among the positions that were queried; without it, any (the tokens given at the start).
        """

    def position_tables(self) -> dict[str, int]:
        """Names of parameters with one row per token of the grid, which another grid interpolates, and the number of rows that come
        before those."""
        return {}


@dataclass(frozen=True)
class BackboneTraits:
    """What a backbone asks of order and condition, so that parts that cannot work together are refused before anything is built."""

    max_group: ClassVar[int | None] = None
    """The most tokens it predicts in one step; None: no limit."""
    masked: ClassVar[bool] = False
    """True if it is trained on randomly masked tokens and so needs a random order."""

    @property
    def max_condition(self) -> int | None:
        """The most condition tokens it takes; None: no limit."""
        return None


def check_transformer(positions: Positions, attention_dropout: float, dropout: float, **towers: tuple[int, int]) -> None:
    """Refuses values of a backbone's config that its transformers cannot have.

    Args:
        towers: (width, heads) of each transformer by name.
    """
    require(positions in ("learned", "rotary"), f"backbone.positions is '{positions}'; allowed: learned, rotary")
    for name, value in (("attention_dropout", attention_dropout), ("dropout", dropout)):
        require(0 <= value < 1, f"backbone.{name} is {value}; allowed: 0 up to below 1")
    for name, (width, heads) in towers.items():
        require(width % heads == 0, f"{name} width {width} is not divisible by its {heads} heads")
        fits = positions == "learned" or width // heads % 4 == 0
        require(
            fits, f"{name} heads of {width // heads} dimensions with rotary positions; allowed: multiples of 4, two axes of pairs"
        )
