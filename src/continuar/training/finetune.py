"""A model's weights at another grid of tokens: what was learned at 256 pixels, at 512.

Weights that a run begins with instead of random ones: fine-tuning, at another grid of tokens and on other classes too.

1. Networks must be the same: everything in the configs of backbone, head and condition that decides what weights mean, and the
   kind of the tokens. What only decides how they are trained may differ: dropout, masks, timesteps per token, the order.
   Ids must be those of the same codebook.
2. Position embeddings are interpolated from grid to grid.
3. With another number of classes their embeddings begin anew; that of "no class" is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continuar.checkpoints.mar import model_file, read_official, to_continuar
from continuar.checkpoints.store import current_names, load_state, read_pipeline_config, read_tokenizer
from continuar.config import differences, to_json
from continuar.errors import UserError, require
from continuar.models.autoregressive import Model, ModelConfig
from continuar.models.conditions import LabelsConfig
from continuar.models.dit import DiTConfig
from continuar.models.positions import Grid, resize_rows
from continuar.pipeline import find_model, read_weights
from continuar.tokenizers import Tokenizer, fingerprint


def resized(state: Mapping[str, Tensor], old: Grid, model: Model) -> dict[str, Tensor]:
    """Weights of a model of grid ``old`` for ``model``: position embeddings are interpolated, all others stay as they are.

    Raises:
        UserError: there is no way from one grid to the other, or a table has another number of rows than its grid.
    """
    tables = {f"backbone.{name}": before for name, before in model.backbone.position_tables().items()}
    new = model.config.tokens.grid
    return {k: resize_rows(v, old, new, tables[k]) if k in tables else v for k, v in state.items()}


def at_grid(model: Model, grid: Grid) -> Model:
    """A model of the same weights for a grid of ``grid`` tokens, (h, w), on the same device.

    Raises:
        UserError: see `resized`.
    """
    config = replace(model.config, tokens=replace(model.config.tokens, grid=grid))
    other = config.build().to(next(model.parameters()).device).train(model.training)
    other.load_state_dict(resized(model.state_dict(), model.config.tokens.grid, other))
    return other


_LOG = logging.getLogger("continuar")
_HOW_TRAINED = {"attention_dropout", "dropout", "mask_ratio_min", "mask_granularity", "diffusion_batch_mul", "label_smoothing"}
"""Fields of backbone and head that weights do not depend on."""
_CLASSES = "condition.embedding"


def begin_from(model: Model, source: str, tokenizer: Tokenizer) -> None:
    """Overwrites a model's weights by those of another, averaged ones where there are two sets.

    Args:
        tokenizer: what makes the model's tokens.
        source: a run, a saved model, a checkpoint, a shipped name, or an official MAR file (.pth).

    Raises:
        UserError: not found or unreadable; what does not fit, by name.
    """
    config, state, before = _read(source)
    check_same_network(config, model.config, source)
    if before is not None:
        was, now = fingerprint(before), fingerprint(tokenizer)
        require(
            was == now,
            f"{source} was trained on ids of another codebook (fingerprint {was[:12]}, not {now[:12]}), where the same ids mean "
            "something else; allowed: the tokenizer it was trained with",
        )
    own = model.state_dict()
    if config.classes != model.config.classes and isinstance(config.condition, LabelsConfig):
        counts = f"{source} has {config.classes} classes, the data {model.config.classes}"
        _LOG.warning("%s: embeddings of classes begin anew, that of no class is kept", counts)
        state[_CLASSES] = torch.cat((own[_CLASSES][:-1].cpu(), state[_CLASSES][-1:].to(own[_CLASSES].dtype)))
    load_state(model, resized(state, config.tokens.grid, model), source)


def check_same_network(old: ModelConfig, new: ModelConfig, where: str) -> None:
    """Refuses weights that mean something else in the new model, whatever their shapes.

    Raises:
        UserError: every setting that differs.
    """
    before, after = _meaning(old), _meaning(new)
    for name, part in before.items():
        if part.get("kind") != after[name].get("kind"):  # of different kinds every field differs
            before[name], after[name] = {"kind": part["kind"]}, {"kind": after[name]["kind"]}
    found = differences(before, after)
    allowed = "the same; grid, classes, order, dropout and masks may differ"
    require(not found, f"{where} is another model ({'; '.join(found)}); allowed: {allowed}")


def _meaning(config: ModelConfig) -> dict[str, dict[str, Any]]:
    parts = {name: to_json(getattr(config, name)) for name in ("backbone", "head", "condition")}
    for part in parts.values():
        for name in _HOW_TRAINED & part.keys():
            del part[name]
        for name in ("width", "heads"):  # of a decoder 0 is the encoder's
            if f"decoder_{name}" in part:
                part[f"decoder_{name}"] = part[f"decoder_{name}"] or part[name]
    return {"tokens": {"dim": config.tokens.dim, "vocabulary": config.tokens.vocabulary}, **parts}


def _read(source: str) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer | None]:
    """Config, weights and, of a saved model of ids, its tokenizer; latents of another are nothing to refuse."""
    tokenizer = None
    if Path(source).suffix == ".pth" and Path(source).is_file():
        official = read_official(Path(source))
        config, state = model_file(official)[0].model, official.state
        converted = to_continuar(state, config, source)
    else:
        directory = find_model(source)
        file, state = read_pipeline_config(directory), read_weights(directory, "ema")[0]
        config = file.model
        tokenizer = read_tokenizer(directory, file.tokenizer) if config.tokens.kind == "id" else None
        converted = current_names(state)
    if isinstance(config, DiTConfig):
        raise UserError(f"{source} is a DiT; allowed: a model of order, backbone and head")
    return config, converted, tokenizer
