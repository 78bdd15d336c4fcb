"""The model: token embedding and condition, joined to an order, a backbone and a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from continuar.backbones import Backbone, BackboneConfig, MAEConfig
from continuar.conditions import Condition, ConditionConfig, LabelsConfig
from continuar.errors import require
from continuar.heads import DiffusionHeadConfig, Head, HeadConfig
from continuar.orders import MAROrderConfig, Order, OrderConfig, View
from continuar.parts import check_condition, check_parts
from continuar.rows import take
from continuar.tokenizers import TokenSpec


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the weights' names and shapes."""

    tokens: TokenSpec
    classes: int = 0
    """Number of class labels; 0 for an unconditional model, or one with another condition."""
    order: OrderConfig = field(default_factory=MAROrderConfig)
    backbone: BackboneConfig = field(default_factory=MAEConfig)
    head: HeadConfig = field(default_factory=DiffusionHeadConfig)
    condition: ConditionConfig = field(default_factory=LabelsConfig)

    def __post_init__(self) -> None:
        require(self.classes >= 0, f"classes is {self.classes}; allowed: 0 or more")
        check_parts(self.tokens, self.order, self.backbone, self.head)
        check_condition(self.condition, self.classes, self.backbone)

    def build(self) -> Model:
        """A freshly initialised model on torch's current default device."""
        return Model(self)


class Model(nn.Module):
    """Tokens and their condition -> loss; and the parts of which generation is made.

    B images, N tokens, Q queried, D token dim, E backbone width, Z condition width. Tokens are [B, N, D] or ids [B, N].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        spec = config.tokens
        self.order: Order = config.order.build(spec.positions)
        self.backbone: Backbone[Any] = config.backbone.build(spec.grid)
        if spec.kind == "id":
            self.token_embedding = nn.Embedding(spec.vocabulary, self.backbone.width)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        else:
            self.token_embedding = nn.Linear(spec.dim, self.backbone.width)
            nn.init.xavier_uniform_(self.token_embedding.weight)
            nn.init.zeros_(self.token_embedding.bias)
        self.condition: Condition = config.condition.build(config.classes, self.backbone.width)
        self.head: Head = config.head.build(spec.size, self.backbone.z_dim)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.config.classes

    def training_view(self, batch: int, device: torch.device) -> View:
        """A random view from torch's default generators; the number of known tokens is drawn on the host."""
        queried = self.backbone.draw_queried()
        return View(self.order.training_order(batch, device), self.order.positions - queried)

    def loss(self, tokens: Tensor, condition: Tensor | None, view: View, condition_dropout: float = 0.0) -> Tensor:
        """The head's loss for every predicted token, [B, Q].

        Args:
            tokens: [B, N, D] of about unit std, or ids [B, N].
            condition: int64 labels [B], or vectors [B, C, dim], as the model's condition is; None: the null condition for all.
            view: what is known.
            condition_dropout: the probability with which a row's condition is replaced by the null condition (paper: 0.1).
        """
        cond = self.condition.null(len(tokens)) if condition is None else self.condition(condition, condition_dropout)
        require(len(cond) == len(tokens), f"{len(cond)} conditions for {len(tokens)} images; allowed: one each")
        z = self.backbone(self.token_embedding(tokens), cond, view)
        target = take(tokens, view.query_BQ)
        return self.head(z.flatten(0, 1), target.flatten(0, 1)).view(view.query_BQ.shape)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(with, without) weight decay: none on biases, norms and the whole head (paper, Appendix B)."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (others if parameter.ndim <= 1 or name.startswith("head.") else decayed).append(parameter)
        return decayed, others


def parameter_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(part, parameters) of each direct child, for tables."""
    for name, child in model.named_children():
        yield name, sum(p.numel() for p in child.parameters())
