"""``continuar tokenizer list|save|stats|train|evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from continuar.checkpoints.tokenizers import Changes, load_tokenizer, save_tokenizer
from continuar.cli.common import parse
from continuar.errors import unknown_name
from continuar.tokenizers.vae import NAMED

_COMMANDS = {
    "list": "the tokenizers of the paper's Table 2",
    "save": "keep an autoencoder (diffusers, hub, LDM) as a saved tokenizer",
    "stats": "measure mean and std of latents, and keep the scale with the tokenizer",
    "train": "train a KL or VQ tokenizer by a recipe",
    "evaluate": "PSNR, SSIM, Frechet distance and codebook use of reconstructions",
}
_HELP = f"""usage: continuar tokenizer COMMAND ...

commands:
{chr(10).join(f"  {name:<9} {text}" for name, text in _COMMANDS.items())}

`continuar tokenizer COMMAND --help` lists a command's options.
"""


@dataclass(frozen=True)
class SaveArguments:
    """Keep an autoencoder as a saved tokenizer."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A diffusers directory or hub id, an LDM-layout file, a saved tokenizer, or a training run of one."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """A new directory, or a saved tokenizer to replace."""
    image_size: int | None = None
    """Pixels; 256 if the source does not tell."""
    patch: int | None = None
    """Side of the square of latents that makes one token."""
    scale: float | None = None
    """1/std of the latents, where it is known."""
    ids: bool = False
    """Of a VQ autoencoder: ids of the codebook instead of vectors before quantisation."""


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        raise unknown_name("tokenizer command", name, _COMMANDS)
    if name == "list":
        print(table(), end="")
        return 0
    if name == "save":
        return _save(rest)
    return import_module(f"continuar.cli.tokenizer_{name}").main(rest)


def table() -> str:
    """Table 2's tokenizers, one line each."""
    lines = [f"{'name':<12} {'network':<22} {'stride':>6} {'channels':>8} {'patch':>5}  tokens at 256"]
    for name, config in NAMED.items():
        network, spec = config.network, config.spec
        tokens = f"{spec.grid[0]} x {spec.grid[1]} of dim {spec.dim}"
        lines.append(f"{name:<12} {network.class_name:<22} {network.stride:>6} {network.channels:>8} {config.patch:>5}  {tokens}")
    return "\n".join(lines) + "\n"


def _save(arguments: list[str]) -> int:
    description = "Keep an autoencoder as a saved tokenizer: tokenizer.json and tokenizer.safetensors."
    options = parse(SaveArguments, arguments, prog="continuar tokenizer save", description=description)
    changes = Changes(options.image_size, options.patch, options.scale, options.ids or None)
    tokenizer = load_tokenizer(options.src, changes)
    save_tokenizer(tokenizer.config, tokenizer.state_dict(), options.dst)
    print(f"written  {options.dst}  ({tokenizer.spec})")
    return 0
