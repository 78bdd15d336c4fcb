"""Autoencoder files in the layout of latent diffusion (Rombach et al. 2022) and the paper's ``kl16.ckpt``, both ways.

1. A file is {'state_dict': ...} (LDM), {'model': ...} (the paper) or the weights alone; keys that begin with ``loss.`` belong to
   training and are ignored by name. Nothing a file holds is run.
2. The architecture is read from keys and shapes: stages, widths, attention, latent channels, codebook.
3. A table of names maps every key; every key and shape is checked, and an unknown key is an error.

Attention's projections are 1x1 convolutions there and linear layers in diffusers: the same numbers in another shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from continuar.checkpoints.store import check_keys, separate
from continuar.errors import UserError, require
from continuar.io import atomic_file, check_file, load_torch_file, read_tensors, write_errors
from continuar.tokenizers.networks import DownBlock, KLNetwork, UpBlock, VQNetwork

LDMNetwork = KLNetwork | VQNetwork
Wrapper = Literal["state_dict", "model"]
_GROUPS = 32
"""Groups of the group norms, written into LDM's code."""
_FIRST = "encoder.conv_in.weight"
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
_PREFIX = "network."
"""Of a tokenizer's weights."""


def read_ldm(path: Path) -> tuple[LDMNetwork, dict[str, Tensor]]:
    """The architecture of a file and its weights as those of a tokenizer.

    Raises:
        UserError: unreadable, not an autoencoder of this layout, or a key or shape that does not fit.
    """
    entry = _autoencoder(_content(path))
    if entry is None:
        raise UserError(f"{path} holds no autoencoder of LDM's layout: it has no {_FIRST}")
    state = _tensors(entry, path)
    network = network_from_ldm(state, str(path))
    return network, {_PREFIX + k: v for k, v in to_diffusers(state, network, str(path)).items()}


def is_ldm(path: Path) -> bool:
    """Whether ``path`` is a file that can be read and holds an autoencoder of this layout."""
    try:
        return path.is_file() and _autoencoder(_content(path)) is not None
    except UserError:
        return False


def write_ldm(
    path: Path, network: LDMNetwork, state: Mapping[str, Tensor], *, wrapper: Wrapper = "state_dict", overwrite: bool = False
) -> int:
    """Writes the weights of a tokenizer as a file in this layout, all of it or nothing.

    Returns:
        how many tensors it has.

    Raises:
        UserError: the file exists or cannot be written; the network has no place in this layout.
    """
    check_file(path, overwrite)
    layout = to_ldm({k.removeprefix(_PREFIX): v for k, v in state.items()}, network)
    with write_errors(path), atomic_file(path) as handle:
        torch.save({wrapper: layout}, handle)
    return len(layout)


def network_from_ldm(state: Mapping[str, Tensor], where: str = "the file") -> LDMNetwork:
    """The architecture that keys and shapes tell.

    Raises:
        UserError: not a KL or VQ autoencoder that diffusers' networks can hold.
    """

    def size(key: str, dim: int = 0) -> int:
        require(key in state and state[key].ndim > dim, f"{where} lacks {key}, which tells its size")
        return state[key].shape[dim]

    def count(pattern: str) -> int:
        return next(i for i in range(len(state) + 1) if pattern.format(i) not in state)

    stages = count("encoder.down.{}.block.0.conv1.weight")
    require(stages >= 1, f"{where} has no encoder.down.0: it is not an autoencoder of LDM's layout")
    layers = count("encoder.down.0.block.{}.conv1.weight")
    widths = tuple(size(f"encoder.down.{i}.block.0.conv1.weight") for i in range(stages))
    require(size(_FIRST) == widths[0], f"{where}: ch_mult begins with {widths[0]}/{size(_FIRST)}; allowed: 1")
    odd = [w for w in widths if w % _GROUPS]
    require(not odd, f"{where} has the width {odd[:1]}; allowed: multiples of {_GROUPS}")
    attends = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(stages)]
    down: list[DownBlock] = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends]
    attends = [f"decoder.up.{i}.attn.0.q.weight" in state for i in range(stages)]
    up: list[UpBlock] = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends]
    common: dict[str, Any] = {
        "down_block_types": tuple(down),
        "up_block_types": tuple(up[::-1]),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }
    latent, embed = size("post_quant_conv.weight", 0), size("post_quant_conv.weight", 1)
    if "quantize.embedding.weight" in state:
        codes = size("quantize.embedding.weight")
        return VQNetwork(latent_channels=latent, num_vq_embeddings=codes, vq_embed_dim=embed, **common)
    require(latent == embed, f"{where} has z_channels {latent} and embed_dim {embed}; allowed: equal")
    return KLNetwork(latent_channels=latent, **common)


def names(network: LDMNetwork) -> dict[str, str]:
    """LDM's names of all weights -> diffusers' names."""
    _check(network)
    last = len(network.block_out_channels) - 1
    parts = {name: name for name in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")}
    parts |= {f"{half}.norm_out": f"{half}.conv_norm_out" for half in ("encoder", "decoder")}
    parts |= {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        parts |= _block(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _RESNET)
        parts |= _block(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _ATTENTION)
        parts |= _block(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _RESNET)
    for i in range(last + 1):
        # LDM counts the decoder's stages from full resolution, diffusers from the lowest.
        down, up = (f"encoder.down.{i}", f"encoder.down_blocks.{i}"), (f"decoder.up.{i}", f"decoder.up_blocks.{last - i}")
        for theirs, ours in (down, up):
            for j in range(network.layers_per_block + 1):
                parts |= _block(f"{theirs}.block.{j}", f"{ours}.resnets.{j}", _RESNET)
                parts |= _block(f"{theirs}.attn.{j}", f"{ours}.attentions.{j}", _ATTENTION)
        parts[f"{down[0]}.downsample.conv"] = f"{down[1]}.downsamplers.0.conv"
        parts[f"{up[0]}.upsample.conv"] = f"{up[1]}.upsamplers.0.conv"
    table = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in parts.items() for leaf in ("weight", "bias")}
    table["quantize.embedding.weight"] = "quantize.embedding.weight"
    # The table has all that may occur; shortcuts are where the width changes, attention where it is wanted.
    has = _shapes(network)
    found = {theirs: ours for theirs, ours in table.items() if ours in has}
    assert set(found.values()) == set(has), sorted(set(has) - set(found.values()))
    return found


def to_diffusers(state: Mapping[str, Tensor], network: LDMNetwork, where: str = "the file") -> dict[str, Tensor]:
    """Weights in LDM's layout as those of the diffusers network; no bit changes.

    Raises:
        UserError: a key is missing or unknown, or a shape differs.
    """
    table, shapes = names(network), _shapes(network)
    check_keys(state, {theirs: _ldm_shape(ours, shapes[ours]) for theirs, ours in table.items()}, where)
    return separate({ours: state[theirs].reshape(shapes[ours]) for theirs, ours in table.items()})


def to_ldm(state: Mapping[str, Tensor], network: LDMNetwork, where: str = "the tokenizer") -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    table, shapes = names(network), _shapes(network)
    check_keys(state, shapes, where)
    return separate({theirs: state[ours].reshape(_ldm_shape(ours, shapes[ours])) for theirs, ours in table.items()})


def _block(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in table.items()}


def _shapes(network: LDMNetwork) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in network.build().state_dict().items()}


def _ldm_shape(name: str, shape: torch.Size) -> torch.Size:
    return torch.Size((*shape, 1, 1)) if name.endswith(_PROJECTIONS) else shape


def _check(network: LDMNetwork) -> None:
    """Refuses what LDM's code cannot be told."""
    fixed = {"act_fn": "silu", "norm_num_groups": _GROUPS}
    if isinstance(network, KLNetwork):
        fixed |= {"use_quant_conv": True, "use_post_quant_conv": True}
    else:
        fixed["norm_type"] = "group"
    for field, only in fixed.items():
        value = getattr(network, field)
        require(value == only, f"network.{field} is {value!r}, which LDM's layout has no place for; allowed: {only!r}")


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    return load_torch_file(path, "a file of autoencoder weights (.ckpt)")


def _autoencoder(content: Any) -> dict[Any, Any] | None:
    """The entry that holds an autoencoder of this layout, or None."""
    entries = (content, *(content.get(k) for k in ("state_dict", "model"))) if isinstance(content, dict) else ()
    return next((e for e in entries if isinstance(e, dict) and _FIRST in e), None)


def _tensors(state: Mapping[Any, Any], where: Path) -> dict[str, Tensor]:
    """The weights, without those of training."""
    kept = {k: v for k, v in state.items() if not str(k).startswith("loss.")}
    for k, v in kept.items():
        plain = isinstance(v, Tensor) and v.is_floating_point() and v.layout == torch.strided
        named = isinstance(k, str) and k.isprintable()
        require(named and plain, f"{where}: {str(k)[:80]!r} is not a plain tensor of floating-point numbers")
    return {k: v.detach() for k, v in kept.items()}
