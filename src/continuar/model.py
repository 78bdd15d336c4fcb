"""The model: token embedding and condition, joined to an order, a backbone and a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from continuar.backbones import Backbone, BackboneConfig, MAEConfig
from continuar.errors import require
from continuar.heads import DiffusionHeadConfig, Head, HeadConfig
from continuar.orders import MAROrderConfig, Order, OrderConfig, View
from continuar.parts import check_parts
from continuar.rows import take
from continuar.tokenizers import TokenSpec


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the weights' names and shapes."""

    tokens: TokenSpec
    classes: int
    """Number of class labels; 0 for an unconditional model."""
    order: OrderConfig = field(default_factory=MAROrderConfig)
    backbone: BackboneConfig = field(default_factory=MAEConfig)
    head: HeadConfig = field(default_factory=DiffusionHeadConfig)

    def __post_init__(self) -> None:
        require(self.classes >= 0, f"classes is {self.classes}; allowed: 0 or more")
        check_parts(self.tokens, self.order, self.backbone, self.head)

    def build(self) -> Model:
        """A freshly initialised model on torch's current default device."""
        return Model(self)


class Model(nn.Module):
    """Tokens and labels -> loss; and, for generation, tokens -> embeddings and labels -> condition.

    B images, N tokens, Q queried, D token dim, E backbone width, Z condition width. Tokens are [B, N, D] or ids [B, N].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        spec = config.tokens
        self.order: Order = config.order.build(spec.positions)
        self.backbone: Backbone[Any] = config.backbone.build(spec.positions)
        if spec.kind == "id":
            self.token_embedding = nn.Embedding(spec.vocabulary, self.backbone.width)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        else:
            self.token_embedding = nn.Linear(spec.dim, self.backbone.width)
            nn.init.xavier_uniform_(self.token_embedding.weight)
            nn.init.zeros_(self.token_embedding.bias)
        # Row `classes` is the null condition: what a dropped label becomes, and the unconditional half of guidance.
        self.class_embedding = nn.Embedding(config.classes + 1, self.backbone.width)
        self.head: Head = config.head.build(spec.size, self.backbone.z_dim)
        nn.init.normal_(self.class_embedding.weight, std=0.02)

    @property
    def null_label(self) -> int:
        """The label that stands for "no condition"."""
        return self.config.classes

    def condition(self, labels_B: Tensor) -> Tensor:
        """Labels 0..classes (the last is the null condition) -> [B, 1, E]."""
        return self.class_embedding(labels_B).unsqueeze(1)

    def training_view(self, batch: int, device: torch.device) -> View:
        """A random view from torch's default generators; the number of known tokens is drawn on the host."""
        queried = self.backbone.draw_queried()
        return View(self.order.training_order(batch, device), self.order.positions - queried)

    def loss(self, tokens: Tensor, labels_B: Tensor, view: View, label_dropout: float = 0.0) -> Tensor:
        """The head's loss for every predicted token, [B, Q].

        Args:
            tokens: [B, N, D] of about unit std, or ids [B, N].
            labels_B: int64 0..classes.
            view: what is known.
            label_dropout: the probability with which a label is replaced by the null condition (paper: 0.1).
        """
        if label_dropout > 0:
            dropped = torch.rand(labels_B.shape, device=labels_B.device) < label_dropout
            labels_B = labels_B.masked_fill(dropped, self.null_label)
        z = self.backbone(self.token_embedding(tokens), self.condition(labels_B), view)
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
