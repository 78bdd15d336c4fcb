"""The autoregressive model: joins token embedding, condition, order, backbone and head.

Training (`Model.loss`):

1. The condition becomes condition tokens, null with some probability; all tokens are embedded.
2. The backbone gives z for every queried position of the view.
3. The head gives the loss of every queried token given its z.

Generation calls the same parts step by step (`sampling.generate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from continuar.errors import require
from continuar.heads import DiffusionHeadConfig, Head, HeadConfig, HeadOptions
from continuar.heads.base import LossByTimestep
from continuar.models import Backbone, BackboneConfig, MAEConfig
from continuar.models.base import TokenModel
from continuar.models.compatibility import check_condition, check_parts
from continuar.models.conditions import Condition, ConditionConfig, LabelsConfig
from continuar.models.transformer import Block
from continuar.orders import MAROrderConfig, Order, OrderConfig, View
from continuar.tensors import batched_gather
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

    def build_order(self) -> Order:
        """The order over the tokens' positions."""
        return self.order.build(self.tokens.seq_len)

    def options(self) -> HeadOptions:
        """The head's default options."""
        return self.head.options()


class Model(TokenModel):
    """Tokens and their condition -> loss; and the parts that generation calls.

    B images, N tokens, Q queried, D token dim, E backbone width, Z condition width. Tokens are [B, N, D] or ids [B, N].
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.null_label = config, config.classes
        spec = config.tokens
        self.order = config.build_order()
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

    def loss(self, tokens: Tensor, condition: Tensor | None, view: View, condition_dropout: float = 0.0) -> Tensor:
        cond = self.condition.null(len(tokens)) if condition is None else self.condition(condition, condition_dropout)
        assert len(cond) == len(tokens), f"{len(cond)} conditions for {len(tokens)} images"
        z = self.backbone(self.token_embedding(tokens), cond, view)
        target = batched_gather(tokens, view.query_BQ)
        return self.head(z.flatten(0, 1), target.flatten(0, 1)).view(view.query_BQ.shape)

    @property
    def loss_by_timestep(self) -> LossByTimestep:
        return self.head

    def num_masked_distribution(self) -> dict[int, float]:
        return self.backbone.num_masked_distribution()

    def sample_num_masked(self) -> int:
        return self.backbone.sample_num_masked()

    def compiled_parts(self) -> Iterator[nn.Module]:
        yield from (module for module in self.backbone.modules() if isinstance(module, Block))
        yield self.head

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(with, without) weight decay: none on biases, norms and the whole head (paper, Appendix B)."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            (others if parameter.ndim <= 1 or name.startswith("head.") else decayed).append(parameter)
        return decayed, others
