"""Tokenizers on disk: a *saved tokenizer* is a directory with ``tokenizer.json`` and, given a state, ``tokenizer.safetensors``.

`load_tokenizer` takes any of these, told apart by what they hold: a saved tokenizer, a training run of one, a saved model with its
tokenizer beside it, a directory or hub repository of diffusers, a file in LDM's layout. The scale is kept in ``tokenizer.json``;
a model that was trained on the tokens has its own config of them, with the scale it was trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from continuar.checkpoints.ldm import read_ldm
from continuar.checkpoints.store import CONFIG, TOKENIZER, check_replaceable, load_state, read_pipeline_config, read_tokenizer
from continuar.errors import UserError, require
from continuar.io import atomic_directory, read_config, write_json, write_tensors
from continuar.models.compatibility import token_warnings
from continuar.tokenizers import LatentConfig, Tokenizer, TokenizerConfig, VAEConfig, VAETokenizer, VQConfig
from continuar.tokenizers.diffusers_files import load_diffusers
from continuar.tokenizers.networks import VQNetwork

TOKENIZER_CONFIG = "tokenizer.json"
FORMAT = 1
_LOG = logging.getLogger("continuar")


@dataclass(frozen=True)
class TokenizerFile:
    """What ``tokenizer.json`` holds."""

    tokenizer: TokenizerConfig
    format: int = FORMAT

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"format {self.format} of a saved tokenizer; this version reads {FORMAT}")


@dataclass(frozen=True)
class Changes:
    """How a tokenizer is used, where that differs from how it is kept. None: as it is kept."""

    image_size: int | None = None
    """Pixels; any multiple of stride x patch."""
    patch: int | None = None
    """Side of the square of latents that makes one token."""
    scale: float | None = None
    """Multiplies latents."""
    ids: bool | None = None
    """Of a VQ network: ids of the codebook, or the vectors before quantisation."""

    def apply(self, config: TokenizerConfig, where: str) -> TokenizerConfig:
        """The config with these changes.

        Raises:
            UserError: the tokenizer has no such field.
        """
        if self.ids and isinstance(config, VAEConfig):
            if not isinstance(config.network, VQNetwork):
                raise UserError(f"{where} has no codebook, so it gives no ids")
            config = VQConfig(network=config.network, image_size=config.image_size)
        elif self.ids is False and isinstance(config, VQConfig):
            config = VAEConfig(network=config.network, image_size=config.image_size)
        asked = {"image_size": self.image_size, "patch": self.patch, "scale": self.scale}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        for name, value in given.items():
            require(hasattr(config, name), f"{name} is {value}, which a tokenizer of kind '{config.kind}' does not have")
        return replace(config, **given)


def load_tokenizer(source: str | Path, changes: Changes = Changes(), *, warn: bool = True) -> Tokenizer:
    """A tokenizer with its weights, in float32 on the CPU.

    Args:
        source: see the module's docstring.
        changes: image size, patch, scale, ids.
        warn: say if its tokens are known to disappoint.

    Raises:
        UserError: nothing there, or not a tokenizer; damaged, pickled or unfitting weights.
    """
    path = Path(source)
    home = find_saved(path)
    if home is not None:
        tokenizer = read_tokenizer(home, changes.apply(read_tokenizer_file(home).tokenizer, str(home)))
    elif (path / CONFIG).is_file() and (path / TOKENIZER).is_file():
        tokenizer = read_tokenizer(path, changes.apply(read_pipeline_config(path).tokenizer, str(path)))
    elif path.is_file():
        network, state = read_ldm(path)
        config = changes.apply(VAEConfig(network=network), str(source))
        tokenizer = config.build()
        load_state(tokenizer, state, str(source))
    else:
        tokenizer = _from_diffusers(source, changes)
    for line in token_warnings(tokenizer.config, str(source)) if warn else []:
        _LOG.warning(line)
    return tokenizer


def find_saved(path: Path) -> Path | None:
    """The saved tokenizer at ``path``: itself, that of a finished training run, or the newest checkpoint of an unfinished one."""
    if (path / TOKENIZER_CONFIG).is_file():
        return path
    if (path / "tokenizer" / TOKENIZER_CONFIG).is_file():
        return path / "tokenizer"
    checkpoints = sorted(path.glob("checkpoints/step-*/" + TOKENIZER_CONFIG))
    return checkpoints[-1].parent if checkpoints else None


def read_tokenizer_file(directory: Path) -> TokenizerFile:
    """The config of a saved tokenizer.

    Raises:
        UserError: missing, unreadable, or not of this format.
    """
    return read_config(TokenizerFile, directory / TOKENIZER_CONFIG)


def save_tokenizer(config: TokenizerConfig, state: Mapping[str, Tensor], directory: Path) -> None:
    """Writes a saved tokenizer; an existing one there is replaced at once.

    Raises:
        UserError: something else is there.
    """
    check_replaceable(directory, TOKENIZER_CONFIG, TOKENIZER_CONFIG, "saved tokenizer")
    with atomic_directory(directory) as temporary:
        write_json(temporary / TOKENIZER_CONFIG, TokenizerFile(config))
        if state:
            write_tensors(temporary / TOKENIZER, state)


def set_scale(directory: Path, scale: float, shift: float) -> VAEConfig:
    """Keeps a measured scale and shift with a saved tokenizer.

    Raises:
        UserError: not a saved tokenizer of continuous latents.
    """
    file = read_tokenizer_file(directory)
    config = file.tokenizer
    if not isinstance(config, VAEConfig):
        raise UserError(f"{directory} is a tokenizer of kind '{config.kind}', which has no scale; allowed: vae")
    config = replace(config, scale=scale, shift=shift)
    write_json(directory / TOKENIZER_CONFIG, replace(file, tokenizer=config))
    return config


def for_model(config: LatentConfig, source: str | Path) -> VAETokenizer:
    """The autoencoder at ``source`` for a model of latents: sizes and scale are those the model was trained with.

    Raises:
        UserError: it does not give such latents.
    """
    own = load_tokenizer(source, Changes(config.image_size, config.patch, config.scale, ids=False))
    if not isinstance(own, VAETokenizer) or own.spec != config.spec:
        raise UserError(f"{source} gives {own.spec}; the model takes {config.spec}")
    return own


def _from_diffusers(source: str | Path, changes: Changes) -> Tokenizer:
    ids = bool(changes.ids)
    size = 256 if changes.image_size is None else changes.image_size
    return load_diffusers(source, image_size=size, patch=changes.patch or 1, ids=ids, scale=changes.scale)
