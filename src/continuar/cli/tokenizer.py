"""``continuar tokenizer list`` and ``continuar tokenizer save SRC DST``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from continuar.checkpoints.tokenizers import Changes, load_tokenizer, save_tokenizer
from continuar.cli.common import Ids
from continuar.tokenizers.vae import NAMED


@dataclass(frozen=True)
class ListOptions:
    """`continuar tokenizer list` has no options."""


@dataclass(frozen=True)
class SaveOptions:
    """Options of `continuar tokenizer save`."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A diffusers directory or hub id, an LDM-layout file, a saved tokenizer, or a training run of one."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """A new directory, or a saved tokenizer to replace."""
    image_size: int | None = None
    """Side of the images in pixels; 256 if the source does not say."""
    patch: int | None = None
    """Side of the square of latents that makes one token."""
    scale: float | None = None
    """1/std of the latents, if it is known."""
    ids: Ids = False


def list_named(options: ListOptions) -> None:
    """List the tokenizers of the paper's Table 2."""
    print(f"{'name':<12} {'network':<22} {'stride':>6} {'channels':>8} {'patch':>5}  tokens at 256")
    for name, config in NAMED.items():
        network, spec = config.network, config.spec
        tokens = f"{spec.grid[0]} x {spec.grid[1]} of dim {spec.dim}"
        print(f"{name:<12} {network.class_name:<22} {network.stride:>6} {network.channels:>8} {config.patch:>5}  {tokens}")


def save(options: SaveOptions) -> None:
    """Keep an autoencoder as a saved tokenizer: tokenizer.json and tokenizer.safetensors."""
    changes = Changes(options.image_size, options.patch, options.scale, options.ids or None)
    tokenizer = load_tokenizer(options.src, changes)
    save_tokenizer(tokenizer.config, tokenizer.state_dict(), options.dst)
    print(f"written  {options.dst}  ({tokenizer.spec})")
