"""``continuar convert SRC DST``: between official MAR checkpoints and saved models, and between LDM autoencoders and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import Tensor

from continuar.checkpoints.ldm import LDMNetwork, is_ldm, read_ldm, write_ldm
from continuar.checkpoints.mar import describe, export_official, import_official
from continuar.checkpoints.store import TOKENIZER
from continuar.checkpoints.tokenizers import Changes, find_saved, read_tokenizer_file, save_tokenizer
from continuar.cli.common import Destination, Ids
from continuar.errors import UserError, require
from continuar.io import read_tensors
from continuar.pipeline import find_model, shipped_models
from continuar.tokenizers import TokenizerConfig, VAEConfig, VQConfig
from continuar.tokenizers.networks import KLNetwork, VQNetwork
from continuar.tokenizers.vae import named_tokenizer


@dataclass(frozen=True)
class Options:
    """Options of `continuar convert`."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """An official checkpoint or autoencoder file; or a saved model or tokenizer, a run directory, a checkpoint, a shipped name."""
    dst: Destination
    """A new or empty directory, or a saved model or tokenizer to replace; or a file ending in .pth or .ckpt."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights to read from an official file. Into an official file, raw writes the raw weights in place of the averages."""
    heads: int | None = None
    """Attention heads of the encoder, if the official file does not say."""
    decoder_heads: int | None = None
    """Attention heads of the decoder, if the official file does not say."""
    overwrite: bool = False
    """Replace an existing .pth or .ckpt file."""
    like: str | None = None
    """For an autoencoder: take scale and patch of this tokenizer of the paper's Table 2 (vq16, kl16, kl8, kl16_mar)."""
    image_size: int | None = None
    """For an autoencoder: side of the images in pixels; 256 if not given."""
    patch: int | None = None
    """For an autoencoder: side of the square of latents that makes one token."""
    scale: float | None = None
    """For an autoencoder: 1/std of its latents, if it is known."""
    ids: Ids = False


def run(options: Options) -> None:
    """Convert official files into saved models and tokenizers, and back; no bit of a weight changes.

    An official MAR checkpoint file becomes a saved model (DST a directory). A saved model or a run becomes an official checkpoint
    file (DST ending in .pth). An autoencoder in the layout of latent diffusion (kl16.ckpt, kl-f16, vq-f16, kl-f8) becomes a saved
    tokenizer (DST a directory), and back (DST ending in .ckpt). Every key and shape is checked.
    """
    source = Path(options.src)
    if options.dst.suffix == ".ckpt":
        lines, state, tensors, notes = _export_autoencoder(options, source)
    elif is_ldm(source):
        lines, state, tensors, notes = _import_autoencoder(options, source)
    else:
        lines, state, tensors, notes = _convert_model(options, source)
    parameters = sum(v.numel() for v in state.values())
    dtypes = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in state.values()}))
    lines += [
        f"weights  {parameters / 1e6:.2f} M parameters in {tensors} tensors, {dtypes}",
        *(f"note     {note}" for note in notes),
    ]
    print(*lines, f"written  {options.dst}", sep="\n")


Done = tuple[list[str], Mapping[str, Tensor], int, tuple[str, ...]]
"""A conversion for people: lines about what was read, the weights, the number of tensors in the official file, notes."""


def _check_unused(options: Options, what: str, **unset: object) -> None:
    for name, value in unset.items():
        given = getattr(options, name)
        require(given == value, f"--{name.replace('_', '-')} is {given}, which is not for {what}")


def _convert_model(options: Options, source: Path) -> Done:
    _check_unused(options, "a model", like=None, image_size=None, patch=None, scale=None, ids=False)
    if options.dst.suffix == ".pth":
        require(not source.is_file(), f"SRC and DST are both files; for {source}, DST must be a directory")
        for name, value in (("--heads", options.heads), ("--decoder-heads", options.decoder_heads)):
            require(value is None, f"{name} is {value}; a saved model knows its own, so it is not allowed here")
        done = export_official(find_model(options.src), options.dst, weights=options.weights, overwrite=options.overwrite)
    else:
        ours = source.is_dir() or (not source.exists() and options.src in shipped_models())
        require(not ours, f"SRC {source} is not an official file, so DST must end in .pth; it is {options.dst}")
        require(not options.overwrite, "--overwrite is for a DST ending in .pth; a saved model is replaced without it")
        heads, decoder_heads = options.heads, options.decoder_heads
        done = import_official(source, options.dst, weights=options.weights, heads=heads, decoder_heads=decoder_heads)
    model = done.file.model
    grid = f"{model.tokens.grid[0]} x {model.tokens.grid[1]}"
    lines = [
        f"read     {options.src} ({done.weights})",
        f"model    {describe(model)}",
        f"tokens   {grid} of dim {model.tokens.dim}; {model.classes} classes",
    ]
    return lines, done.state, done.tensors, done.notes


def _import_autoencoder(options: Options, source: Path) -> Done:
    """Writes an LDM-layout file as a saved tokenizer; no bit of a weight changes."""
    _check_unused(options, "an autoencoder", weights="ema", heads=None, decoder_heads=None)
    require(not options.overwrite, "--overwrite is for a DST ending in .pth or .ckpt; a saved tokenizer is replaced without it")
    require(options.dst.suffix != ".pth", f"SRC {source} is an autoencoder, so DST must be a directory; it is {options.dst}")
    network, state = read_ldm(source)
    config: TokenizerConfig = VAEConfig(network=network)
    if options.like is not None:
        config = named_tokenizer(options.like)
        require(config.network == network, f"{source} is not of the architecture '{options.like}': it is {_architecture(network)}")
    changes = Changes(options.image_size, options.patch, options.scale, options.ids or None)
    config = changes.apply(config, str(source))
    save_tokenizer(config, state, options.dst)
    unmeasured = isinstance(config, VAEConfig) and config.scale == 0
    note = f"no scale is in the file: `continuar tokenizer stats {options.dst} DATA` measures it"
    return _autoencoder_lines(options, config, network), state, len(state), (note,) if unmeasured else ()


def _export_autoencoder(options: Options, source: Path) -> Done:
    """Writes a saved tokenizer as an LDM-layout file."""
    _check_unused(options, "an autoencoder", weights="ema", heads=None, decoder_heads=None)
    _check_unused(options, "a DST ending in .ckpt", like=None, image_size=None, patch=None, scale=None, ids=False)
    home = find_saved(source)
    if home is None:
        raise UserError(f"SRC {source} is not a saved tokenizer; a DST ending in .ckpt is made of one")
    config = read_tokenizer_file(home).tokenizer
    network = config.network if isinstance(config, VAEConfig | VQConfig) else None
    if not isinstance(network, KLNetwork | VQNetwork):
        kind = config.kind if network is None else network.kind
        raise UserError(f"{source} is of kind '{kind}', which LDM's layout has no place for; allowed: kl, vq")
    state = read_tensors(home / TOKENIZER)
    write_ldm(options.dst, network, state, overwrite=options.overwrite)
    kept = f"scale {config.scale:.6g}, shift {config.shift:.6g}, patch {config.patch}" if isinstance(config, VAEConfig) else "ids"
    note = f"LDM's layout holds only weights: image size {config.image_size}, {kept} are left out"
    return _autoencoder_lines(options, config, network), state, len(state), (note,)


def _autoencoder_lines(options: Options, config: TokenizerConfig, network: LDMNetwork) -> list[str]:
    spec = config.spec
    tokens = f"of dim {spec.dim}" if spec.kind == "vector" else f"of {spec.vocabulary} ids"
    scale = f", scale {config.scale:.6g}" if isinstance(config, VAEConfig) and config.scale else ""
    return [
        f"read     {options.src}",
        f"network  {_architecture(network)}",
        f"tokens   {spec.grid[0]} x {spec.grid[1]} {tokens}, images of {config.image_size}{scale}",
    ]


def _architecture(network: LDMNetwork) -> str:
    """An architecture in one line, for people."""
    blocks = (("down", network.down_block_types), ("up", network.up_block_types))
    attention = [f"{half} {i}" for half, types in blocks for i, t in enumerate(types) if t.startswith("Attn")]
    codes = f", {network.num_vq_embeddings} codes" if isinstance(network, VQNetwork) else ""
    where = f"; attention in {', '.join(attention)}" if attention else ""
    return f"stride {network.stride}, {network.channels} channels, widths {network.block_out_channels}{codes}{where}"
