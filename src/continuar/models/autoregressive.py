"""Which orders, backbones, heads and tokens go together. What cannot work is refused when a config is made, with the reason; what
works and is known to disappoint is said, with a better choice.

The model: token embedding and condition, joined to an order, a backbone and a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from continuar.config import kind_of, members
from continuar.errors import require
from continuar.heads import DiffusionHeadConfig, Head, HeadConfig, HeadOptions
from continuar.heads.base import LossByTimestep
from continuar.models import Backbone, BackboneConfig, MAEConfig
from continuar.models.base import TokenModel
from continuar.models.conditions import Condition, ConditionConfig, LabelsConfig
from continuar.models.transformer import Block
from continuar.orders import MAROrderConfig, Order, OrderConfig, View
from continuar.tensors import batched_gather
from continuar.tokenizers import TokenSpec

ORDERS, BACKBONES, HEADS = members(OrderConfig), members(BackboneConfig), members(HeadConfig)


def check_parts(tokens: TokenSpec, order: Any, backbone: Any, head: Any) -> None:
    """Refuses parts that cannot work together.

    Args:
        tokens: what the tokenizer gives.
        order, backbone, head: configs, or their classes: what decides is declared on the class.

    Raises:
        UserError: the reason and what is allowed instead.
    """
    require(
        backbone.max_group is None or order.max_group is not None,
        f"order '{_kind(order)}' predicts groups of tokens, a {_kind(backbone)} backbone one at a time; allowed orders: "
        + _listed(o for o in ORDERS if o.max_group is not None),
    )
    require(
        not (backbone.masked and order.fixed),
        f"a {_kind(backbone)} backbone learns from random masks and would hardly ever see the prefixes of order '{_kind(order)}'; "
        "allowed orders: " + _listed(o for o in ORDERS if not o.fixed),
    )
    require(
        not order.needs_log_prob or head.has_log_prob,
        f"order '{_kind(order)}' goes by the probability of what was drawn, which a {_kind(head)} head does not know; "
        "allowed heads: " + _listed(h for h in HEADS if h.has_log_prob),
    )
    what = f"ids of a vocabulary of {tokens.vocabulary}" if tokens.kind == "id" else f"vectors of dim {tokens.dim}"
    require(
        head.token_kind == tokens.kind,
        f"the tokenizer gives {what}, a {_kind(head)} head makes {'ids' if head.token_kind == 'id' else 'vectors'}; allowed heads: "
        + _listed(h for h in HEADS if h.token_kind == tokens.kind),
    )


def check_condition(condition: Any, classes: int, backbone: Any) -> None:
    """Refuses a condition that the data or the backbone does not suit.

    Args:
        condition, backbone: configs.
        classes: the number of class labels.

    Raises:
        UserError: the reason and what is allowed instead.
    """
    require(
        condition.labelled or classes == 0,
        f"classes is {classes} with a condition of {_kind(condition)}, which has no classes; allowed: 0",
    )
    limit = backbone.max_condition
    require(
        limit is None or condition.count <= limit,
        f"a condition of {condition.count} tokens does not fit into the buffer of {limit}; allowed: 1 to {limit}, "
        "or a larger backbone.buffer",
    )


FEW, MANY, COARSE, WIDE_PATCH = 64, 1024, 16, 8
"""Tokens per image that are few with a coarse stride, and many; a coarse stride in pixels; the widest patch of pixels that keeps
detail."""


def config_warnings(tokenizer: Any, head: Any) -> list[str]:
    """What others have tried and found poor, one line each: the combination, then what is better.

    Args:
        tokenizer, head: configs.
    """
    return [*token_warnings(tokenizer), *_head_warnings(tokenizer.spec, head)]


def token_warnings(tokenizer: Any, name: str = "") -> list[str]:
    """See `config_warnings`.

    Args:
        tokenizer: a config.
        name: the tokenizer's, if it has one.
    """
    size, count, square = tokenizer.image_size, tokenizer.spec.seq_len, f"{tokenizer.image_size}x{tokenizer.image_size} images"
    stride = getattr(tokenizer, "stride", None) or getattr(getattr(tokenizer, "network", None), "stride", None)
    slow = f"{count:,} tokens, and more than {MANY:,} are slow"
    if stride is None:
        return _patch_warnings(tokenizer, square, slow)
    if count < FEW and stride >= COARSE:
        better = max((s for s in (8, 4, 2) if (size // s) ** 2 >= FEW), default=1)
        through = f"{name} (stride {stride})" if name else f"a stride of {stride}"
        few = f"{square} through {through} are only {count} tokens, which is known to look poor"
        return [f"{few}; better: a tokenizer of stride {better}"]
    if count > MANY:
        side = size // stride
        patch = next(p for p in range(1, side + 1) if side % p == 0 and (side // p) ** 2 <= MANY)
        merged = f"--tokenizer.patch {patch}" if hasattr(tokenizer, "patch") else f"a tokenizer of stride {stride * patch}"
        return [f"{square} through a stride of {stride} are {slow}; better: {merged}"]
    return []


def _patch_warnings(tokenizer: Any, square: str, slow: str) -> list[str]:
    """Of pixels."""
    size, patch, latents = tokenizer.image_size, tokenizer.patch, "latents of an autoencoder (docs/tokenizers.md)"
    patches = f"{square} in patches of {patch}x{patch} pixels"
    allowed = [p for p in range(1, WIDE_PATCH + 1) if size % p == 0]
    if tokenizer.spec.seq_len > MANY:
        wider = [f"--tokenizer.patch {p}" for p in allowed if (size // p) ** 2 <= MANY]
        return [f"{patches} are {slow}; better: {' or '.join([latents, *wider[:1]])}"]
    if patch > WIDE_PATCH:
        return [f"{patches} are known to lose detail; better: --tokenizer.patch {allowed[-1]} or {latents}"]
    return []


def _head_warnings(tokens: TokenSpec, head: Any) -> list[str]:
    kind = _kind(head)
    if kind == "regression":
        return ["a regression head draws the mean of what is plausible: the paper's control, FID above 100; better: diffusion"]
    if kind in ("diffusion", "flow") and head.width < tokens.dim:
        narrow = f"a {kind} head of width {head.width} is narrower than tokens of dim {tokens.dim}"
        return [f"{narrow}, which it squeezes; better: --head.width {tokens.dim} or more"]
    return []


def _kind(config: Any) -> str:
    return kind_of(config if isinstance(config, type) else type(config))


def _listed(classes: Any) -> str:
    return ", ".join(kind_of(c) for c in classes)


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
    """Tokens and their condition -> loss; and the parts of which generation is made.

    B images, N tokens, Q queried, D token dim, E backbone width, Z condition width. Tokens are [B, N, D] or ids [B, N].
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
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

    @property
    def loss_by_timestep(self) -> LossByTimestep:
        return self.head

    def num_masked_distribution(self) -> dict[int, float]:
        return self.backbone.num_masked_distribution()

    def sample_num_masked(self) -> int:
        return self.backbone.sample_num_masked()

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
        target = batched_gather(tokens, view.query_BQ)
        return self.head(z.flatten(0, 1), target.flatten(0, 1)).view(view.query_BQ.shape)

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
