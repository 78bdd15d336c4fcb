"""What a model of an image's tokens is to training, saved models and pipelines, whatever it is made of.

`Model` (order, backbone and head) is one, the baseline `DiT` another.

What a backbone is: known tokens and a condition -> one condition vector z per queried position.

A backbone's config says what it asks of an order: ``max_group``, the most tokens it can predict at once (None: no limit), and
``masked``, whether it is trained on randomly masked tokens and so needs an order that is random too; and of a condition:
``max_condition``, the most condition tokens it takes (None: no limit).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from continuar.heads import HeadOptions
from continuar.heads.base import Head, LossByTimestep
from continuar.models.transformer import Block
from continuar.orders import Order, View
from continuar.tokenizers import TokenSpec


class TokenModelConfig(Protocol):
    """Everything that determines the weights' names and shapes."""

    @property
    def tokens(self) -> TokenSpec:
        """What is modelled."""
        ...

    @property
    def classes(self) -> int:
        """Number of class labels; 0 for an unconditional model."""
        ...

    def build(self) -> TokenModel:
        """A freshly initialised model on torch's current default device."""
        ...

    def build_order(self) -> Order:
        """Which positions a step of generation predicts."""
        ...

    def options(self) -> HeadOptions:
        """The default options of drawing tokens."""
        ...


class TokenModel(nn.Module, ABC):
    """Tokens and their condition -> loss. B images, N tokens, Q queried. Tokens are [B, N, D] or ids [B, N].

    Attributes:
        config: what `config.build` makes another one of.
        order: which positions a step of generation predicts.
    """

    config: Any
    order: Order

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.config.classes

    @property
    @abstractmethod
    def loss_by_timestep(self) -> LossByTimestep:
        """The part whose losses by time training watches."""

    @abstractmethod
    def num_masked_distribution(self) -> dict[int, float]:
        """Every number that `sample_num_masked` can give, with its probability: the shapes training will see."""

    @abstractmethod
    def sample_num_masked(self) -> int:
        """How many tokens the next training view predicts, 1..N: a host integer, from torch's default generator of the CPU."""

    @abstractmethod
    def loss(self, tokens: Tensor, condition: Tensor | None, view: View, condition_dropout: float = 0.0) -> Tensor:
        """The loss of every predicted token, [B, Q].

        Args:
            tokens: [B, N, D] of about unit std, or ids [B, N].
            condition: int64 labels [B], or what the model's condition is; None: the null condition for all.
            view: what is known.
            condition_dropout: the probability with which a row's condition is replaced by the null condition (paper: 0.1).
        """

    @abstractmethod
    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(with, without) weight decay."""

    @abstractmethod
    def compiled_parts(self) -> Iterator[nn.Module]:
        """What training compiles: each part by itself, because those of equal shape share one compilation."""

    def shard_units(self) -> Iterator[tuple[list[nn.Module], bool]]:
        """(modules, low) for each group of modules that FSDP gathers together (`continuar.distributed.Shardable`)."""
        for module in self.modules():
            if isinstance(module, Block):
                yield [module.attention, module.mlp], True
            elif isinstance(module, Head):
                yield [module], False

    def training_view(self, batch: int, device: torch.device, queried: int | None = None) -> View:
        """A random view from torch's default generators, of ``queried`` predicted tokens; None: a number drawn on the host."""
        queried = self.sample_num_masked() if queried is None else queried
        return View(self.order.training_order(batch, device), self.order.seq_len - queried)

    def mean_num_masked(self) -> float:
        """Expected number of predicted tokens per training image, for FLOP counts."""
        return sum(count * share for count, share in self.num_masked_distribution().items())


def parameter_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(part, parameters) of each direct child, for tables."""
    for name, child in model.named_children():
        yield name, sum(p.numel() for p in child.parameters())


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
    def sample_num_masked(self) -> int:
        """How many tokens the next training view predicts, 1..N: a host integer, from torch's default generator of the CPU."""

    @abstractmethod
    def num_masked_distribution(self) -> dict[int, float]:
        """Every number that `sample_num_masked` can give, with its probability: the shapes training will see."""

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
