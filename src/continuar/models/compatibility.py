"""Which orders, backbones, heads, tokens and conditions go together.

`check_parts` and `check_condition` refuse what cannot work, with the reason, when a config is made. `config_warnings` names what
works but is known to give poor or slow results, with a better choice.
"""

from __future__ import annotations

from typing import Any

from continuar.config import kind_of, members
from continuar.errors import require
from continuar.heads import HeadConfig
from continuar.models import BackboneConfig
from continuar.orders import OrderConfig
from continuar.tokenizers import TokenSpec

ORDERS, BACKBONES, HEADS = members(OrderConfig), members(BackboneConfig), members(HeadConfig)


def check_parts(tokens: TokenSpec, order: Any, backbone: Any, head: Any) -> None:
    """Refuses parts that cannot work together.

    Args:
        tokens: the tokenizer's output.
        order, backbone, head: configs, or their classes: only class attributes are read.

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
    """Refuses a condition that does not suit the data or the backbone.

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


FEW_TOKENS, MANY_TOKENS = 64, 1024
COARSE_STRIDE = 16
WIDEST_PATCH = 8
"""Fewer tokens than `FEW_TOKENS` through a stride (in pixels) of `COARSE_STRIDE` or more look poor, more than `MANY_TOKENS` are
slow, and wider patches of pixels than `WIDEST_PATCH` lose detail."""


def config_warnings(tokenizer: Any, head: Any) -> list[str]:
    """Combinations known to give poor or slow results, one line each: the combination, then a better choice.

    Args:
        tokenizer, head: configs.
    """
    kind, dim, found = _kind(head), tokenizer.spec.dim, token_warnings(tokenizer)
    if kind == "regression":
        found.append("a regression head draws the mean of what is plausible: the paper's control, FID above 100; better: diffusion")
    if kind in ("diffusion", "flow") and head.width < dim:
        narrow = f"a {kind} head of width {head.width} is narrower than tokens of dim {dim}"
        found.append(f"{narrow}, which it squeezes; better: --head.width {dim} or more")
    return found


def token_warnings(tokenizer: Any, name: str = "") -> list[str]:
    """The warnings of `config_warnings` about the tokens.

    Args:
        tokenizer: a config.
        name: the tokenizer's, if it has one.
    """
    size, count, square = tokenizer.image_size, tokenizer.spec.seq_len, f"{tokenizer.image_size}x{tokenizer.image_size} images"
    slow = f"{count:,} tokens, and more than {MANY_TOKENS:,} are slow"
    stride = getattr(tokenizer, "stride", None) or getattr(getattr(tokenizer, "network", None), "stride", None)
    if stride is None:  # pixels
        latents, patches = "latents of an autoencoder (docs/tokenizers.md)", f"{square} in patches of {tokenizer.patch}x"
        patches += f"{tokenizer.patch} pixels"
        allowed = [p for p in range(1, WIDEST_PATCH + 1) if size % p == 0]
        if count > MANY_TOKENS:
            wider = [f"--tokenizer.patch {p}" for p in allowed if (size // p) ** 2 <= MANY_TOKENS]
            return [f"{patches} are {slow}; better: {' or '.join([latents, *wider[:1]])}"]
        if tokenizer.patch > WIDEST_PATCH:
            return [f"{patches} are known to lose detail; better: --tokenizer.patch {allowed[-1]} or {latents}"]
    elif count < FEW_TOKENS and stride >= COARSE_STRIDE:
        better = max((s for s in (8, 4, 2) if (size // s) ** 2 >= FEW_TOKENS), default=1)
        through = f"{name} (stride {stride})" if name else f"a stride of {stride}"
        few = f"{square} through {through} are only {count} tokens, which is known to look poor"
        return [f"{few}; better: a tokenizer of stride {better}"]
    elif count > MANY_TOKENS:
        side = size // stride
        patch = next(p for p in range(1, side + 1) if side % p == 0 and (side // p) ** 2 <= MANY_TOKENS)
        merged = f"--tokenizer.patch {patch}" if hasattr(tokenizer, "patch") else f"a tokenizer of stride {stride * patch}"
        return [f"{square} through a stride of {stride} are {slow}; better: {merged}"]
    return []
