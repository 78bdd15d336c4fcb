"""Which orders, backbones, heads and tokens go together. What cannot work is refused when a config is made, with the reason."""

from __future__ import annotations

from typing import Any

from continuar.backbones import BackboneConfig
from continuar.configs import kind_of, members
from continuar.errors import require
from continuar.heads import HeadConfig
from continuar.orders import OrderConfig
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


def _kind(config: Any) -> str:
    return kind_of(config if isinstance(config, type) else type(config))


def _listed(classes: Any) -> str:
    return ", ".join(kind_of(c) for c in classes)
