"""What a command's MODEL and --tokenizer name, as a pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from continuar.checkpoints.mar import to_continuar
from continuar.checkpoints.official import read_official
from continuar.checkpoints.official_args import model_file
from continuar.checkpoints.store import load_state
from continuar.checkpoints.tokenizers import for_model
from continuar.devices import pick_device
from continuar.errors import UserError, require
from continuar.pipeline import Pipeline, Weights, load
from continuar.tokenizers import LatentConfig


def load_pipeline(model: str, tokenizer: str | None, *, weights: Weights, device: str | torch.device) -> Pipeline:
    """A model that can make images.

    Args:
        model: a run directory, a saved model, a shipped name, or an official MAR checkpoint file.
        tokenizer: for a model of latents, its autoencoder; see `load_tokenizer`.

    Raises:
        UserError: not found, unreadable, or an autoencoder that is lacking, not needed or unfitting.
    """
    if Path(model).suffix == ".pth" and Path(model).is_file():
        pipe = load_official(Path(model), weights=weights, device=device)
    else:
        pipe = load(model, weights=weights, device=device)
    config = pipe.file.tokenizer
    if isinstance(config, LatentConfig):
        need = f"{model} makes latents of the autoencoder '{config.autoencoder}'; give it by --tokenizer (kl16.ckpt, a directory)"
        if tokenizer is None:
            raise UserError(need)
        pipe.tokenizer = for_model(config, tokenizer).to(pipe.device)
    else:
        require(tokenizer is None, f"--tokenizer is {tokenizer}, but {model} has a tokenizer of its own, of kind '{config.kind}'")
    return pipe


def load_official(path: Path, *, weights: Weights, device: str | torch.device) -> Pipeline:
    """An official MAR checkpoint file as it is; nothing is written."""
    official = read_official(path, weights)
    file, _ = model_file(official)
    state = to_continuar(official.state, file.model, str(path))
    with torch.device("meta"):
        model = file.model.build()
    model.to_empty(device="cpu")
    load_state(model, state, str(path))
    return Pipeline(file, model.float().to(pick_device(device)))
