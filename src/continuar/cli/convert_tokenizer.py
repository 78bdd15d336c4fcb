"""``continuar convert`` for autoencoders: LDM-layout files to saved tokenizers and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from continuar.checkpoints.ldm import LDMNetwork, read_ldm, write_ldm
from continuar.checkpoints.store import TOKENIZER
from continuar.checkpoints.tokenizers import Changes, find_saved, read_tokenizer_file, save_tokenizer
from continuar.errors import UserError, require
from continuar.io import read_tensors
from continuar.tokenizers import TokenizerConfig, VAEConfig, VQConfig
from continuar.tokenizers.networks import KLNetwork, VQNetwork
from continuar.tokenizers.vae import named_tokenizer

SUFFIXES = (".ckpt",)
"""What a destination in LDM's layout ends in."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did, for people."""

    config: TokenizerConfig
    state: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def import_tokenizer(source: Path, destination: Path, changes: Changes, name: str | None) -> Converted:
    """Writes an LDM-layout file as a saved tokenizer; no bit of a weight changes.

    Args:
        changes: image size, patch, scale, ids, where they differ from the named config or the defaults.
        name: a tokenizer of Table 2 whose architecture the file must have, and whose scale and patch it gets.

    Raises:
        UserError: the file cannot be read or is of another architecture, or the destination cannot be written.
    """
    network, state = read_ldm(source)
    config: TokenizerConfig = VAEConfig(network=network)
    if name is not None:
        config = named_tokenizer(name)
        require(config.network == network, f"{source} is not of the architecture '{name}': it is {describe(network)}")
    config = changes.apply(config, str(source))
    save_tokenizer(config, state, destination)
    unmeasured = isinstance(config, VAEConfig) and config.scale == 0
    note = f"no scale is in the file: `continuar tokenizer stats {destination} DATA` measures it"
    return Converted(config, state, (note,) if unmeasured else ())


def export_tokenizer(source: Path, destination: Path, *, overwrite: bool) -> Converted:
    """Writes a saved tokenizer as an LDM-layout file.

    Raises:
        UserError: not a saved tokenizer of a KL or VQ network, or the file cannot be written.
    """
    home = find_saved(source)
    assert home is not None
    config = read_tokenizer_file(home).tokenizer
    network = config.network if isinstance(config, VAEConfig | VQConfig) else None
    if not isinstance(network, KLNetwork | VQNetwork):
        kind = config.kind if network is None else network.kind
        raise UserError(f"{source} is of kind '{kind}', which LDM's layout has no place for; allowed: kl, vq")
    state = read_tensors(home / TOKENIZER)
    write_ldm(destination, network, state, overwrite=overwrite)
    kept = f"scale {config.scale:.6g}, shift {config.shift:.6g}, patch {config.patch}" if isinstance(config, VAEConfig) else "ids"
    return Converted(config, state, (f"LDM's layout holds weights alone: image size {config.image_size}, {kept} are left out",))


def describe(network: LDMNetwork) -> str:
    """An architecture in one line, for people."""
    attention = [f"{half} {i}" for half, types in _blocks(network) for i, t in enumerate(types) if t.startswith("Attn")]
    codes = f", {network.num_vq_embeddings} codes" if isinstance(network, VQNetwork) else ""
    where = f"; attention in {', '.join(attention)}" if attention else ""
    return f"stride {network.stride}, {network.channels} channels, widths {network.block_out_channels}{codes}{where}"


def _blocks(network: LDMNetwork) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("down", network.down_block_types), ("up", network.up_block_types)


def summary(source: str, destination: Path, done: Converted) -> str:
    """What was read and written, one line each."""
    spec, config = done.config.spec, done.config
    assert isinstance(config, VAEConfig | VQConfig)
    assert isinstance(config.network, KLNetwork | VQNetwork)
    tokens = f"of dim {spec.dim}" if spec.kind == "vector" else f"of {spec.vocabulary} ids"
    scale = f", scale {config.scale:.6g}" if isinstance(config, VAEConfig) and config.scale else ""
    parameters = sum(v.numel() for v in done.state.values())
    dtypes = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in done.state.values()}))
    lines = [
        f"read     {source}",
        f"network  {describe(config.network)}",
        f"tokens   {spec.grid[0]} x {spec.grid[1]} {tokens}, images of {config.image_size}{scale}",
        f"weights  {parameters / 1e6:.2f} M parameters in {len(done.state)} tensors, {dtypes}",
        *(f"note     {note}" for note in done.notes),
        f"written  {destination}",
    ]
    return "\n".join(lines) + "\n"
