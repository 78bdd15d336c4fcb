"""The official MAR key layout (LTH14/mar), both ways, every key and shape checked.

Names map one to one but for two things: the head's adaLN projections are one matrix here and one per block there, and
the null condition is the last row of the class embedding here and the parameter ``fake_latent`` there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from continuar.backbones import MAEConfig
from continuar.baselines import DiTConfig
from continuar.checkpoints.store import check_keys
from continuar.conditions import LabelsConfig
from continuar.errors import UserError, require
from continuar.heads import DiffusionHeadConfig
from continuar.model import ModelConfig
from continuar.orders import MAROrderConfig
from continuar.tokenizers import TokenSpec

# (official, ours) for parameters that only change their name; official positions have a leading batch dimension of 1.
_NAMES = {
    "z_proj.weight": "token_embedding.weight",
    "z_proj.bias": "token_embedding.bias",
    "z_proj_ln.weight": "backbone.input_norm.weight",
    "z_proj_ln.bias": "backbone.input_norm.bias",
    "encoder_norm.weight": "backbone.encoder_norm.weight",
    "encoder_norm.bias": "backbone.encoder_norm.bias",
    "decoder_norm.weight": "backbone.decoder_norm.weight",
    "decoder_norm.bias": "backbone.decoder_norm.bias",
    "decoder_embed.weight": "backbone.decoder_input.weight",
    "decoder_embed.bias": "backbone.decoder_input.bias",
    "encoder_pos_embed_learned": "backbone.encoder_positions",
    "decoder_pos_embed_learned": "backbone.decoder_positions",
    "diffusion_pos_embed_learned": "backbone.z_positions",
    "mask_token": "backbone.mask_token",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
_HEAD = {
    "time_embed.mlp.0": "time.0",
    "time_embed.mlp.2": "time.2",
    "cond_embed": "condition",
    "input_proj": "input",
    "final_layer.linear": "output",
}
_HEAD_BLOCK = {"in_ln": "norm", "mlp.0": "mlp.0", "mlp.2": "mlp.2"}
MODELS = {"mar_base": (768, 12, 12), "mar_large": (1024, 16, 16), "mar_huge": (1280, 20, 16)}
"""(width, blocks, heads) of encoder and decoder alike, by the official name of the model."""
_HEADS_OF_WIDTH = {width: heads for width, _, heads in MODELS.values()}
# Keys that sizes are read from, and how many dimensions each has.
_SIZED = {
    "z_proj.weight": 2,
    "encoder_pos_embed_learned": 3,
    "diffusion_pos_embed_learned": 3,
    "class_emb.weight": 2,
    "decoder_embed.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}
_HEAD_PREFIX = "diffloss.net."


def _pairs(table: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in table.items() for leaf in ("weight", "bias")}


def _head_names(depth: int) -> dict[str, str]:
    names = _pairs(_HEAD)
    for i in range(depth):
        names |= {f"res_blocks.{i}.{a}": f"blocks.{i}.{b}" for a, b in _pairs(_HEAD_BLOCK).items()}
    return names


def _adaln_keys(depth: int) -> list[str]:
    return [*(f"res_blocks.{i}.adaLN_modulation.1" for i in range(depth)), "final_layer.adaLN_modulation.1"]


def official_parts(config: ModelConfig | DiTConfig) -> tuple[MAEConfig, DiffusionHeadConfig]:
    """(backbone, head) of a model that the official layout can hold.

    Raises:
        UserError: one of them is of another kind.
    """
    if isinstance(config, DiTConfig):
        raise _no_place("model", config.kind, "a model of order, backbone and head")
    order, backbone, head = config.order, config.backbone, config.head
    if not isinstance(config.condition, LabelsConfig):
        raise _no_place("condition", config.condition.kind, "labels")
    if not isinstance(order, MAROrderConfig):
        raise _no_place("order", order.kind, "mar")
    if not isinstance(backbone, MAEConfig):
        raise _no_place("backbone", backbone.kind, "mae")
    if backbone.positions != "learned":
        raise _no_place("backbone.positions", backbone.positions, "learned")
    if not isinstance(head, DiffusionHeadConfig):
        raise _no_place("head", head.kind, "diffusion")
    if head.prediction != "eps":
        raise _no_place("head.prediction", head.prediction, "eps")
    return backbone, head


def describe(config: ModelConfig | DiTConfig) -> str:
    """The sizes of a MAR in one line, for people."""
    b, head = official_parts(config)
    width = f"{b.width}" + (f" / {b.decoder_width}" if b.decoder_width else "")
    heads = f"{b.heads}" + (f" / {b.decoder_heads}" if b.decoder_heads else "")
    blocks = f"{b.encoder_depth} + {b.decoder_depth} blocks"
    return f"width {width}, {blocks}, {heads} heads; diffusion MLP {head.depth} x {head.width}"


def _no_place(part: str, kind: str, allowed: str) -> UserError:
    return UserError(f"{part} is '{kind}', which the official MAR layout has no place for; allowed: {allowed}")


def _names(config: ModelConfig | DiTConfig) -> dict[str, str]:
    backbone, head = official_parts(config)
    names = dict(_NAMES)
    for part, depth in (("encoder", backbone.encoder_depth), ("decoder", backbone.decoder_depth)):
        for i in range(depth):
            names |= {f"{part}_blocks.{i}.{a}": f"backbone.{part}.{i}.{b}" for a, b in _pairs(_BLOCK).items()}
    return names | {_HEAD_PREFIX + a: f"head.net.{b}" for a, b in _head_names(head.depth).items()}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks ``prefix.0``, ``prefix.1``, ... there are; a gap is an error."""
    found = {int(m.group(1)) for k in state if (m := re.match(rf"{re.escape(prefix)}\.([0-9]+)\.", k))}
    lacking = next(i for i in range(len(found) + 1) if i not in found)
    require(lacking == len(found), f"{prefix}.{lacking} is missing, although there is {prefix}.{max(found, default=0)}")
    return lacking


def _join(state: Mapping[str, Tensor], keys: list[str]) -> Tensor:
    """Rows of several tensors as one; of several dtypes, the way back could not tell which was which."""
    first = state[keys[0]].dtype
    for key in keys:
        require(
            state[key].dtype == first,
            f"{keys[0]} is {first} and {key} {state[key].dtype}; they are joined, so one dtype is needed",
        )
    return torch.cat([state[key] for key in keys])


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors each in storage of its own, as file formats want them; copied only where it is shared."""
    seen: set[int] = set()
    own = {}
    for k, v in state.items():
        storage = v.untyped_storage()
        shared = storage.nbytes() != v.numel() * v.element_size() or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        own[k] = v.clone(memory_format=torch.contiguous_format) if shared else v.contiguous()
    return own


def head_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A denoising MLP in the official layout (no prefix) as the state of `DenoisingMLP`."""
    depth = _depth(state, "res_blocks")
    ours = {b: state[a] for a, b in _head_names(depth).items()}
    for leaf in ("weight", "bias"):
        ours[f"modulation.{leaf}"] = _join(state, [f"{k}.{leaf}" for k in _adaln_keys(depth)])
    return ours


def head_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `head_from_official`."""
    depth = _depth(state, "blocks")
    official = {a: state[b] for a, b in _head_names(depth).items()}
    width = state["input.weight"].shape[0]
    sizes = [3 * width] * depth + [2 * width]
    for leaf in ("weight", "bias"):
        parts = state[f"modulation.{leaf}"].split(sizes)
        official |= {f"{k}.{leaf}": part for k, part in zip(_adaln_keys(depth), parts, strict=True)}
    return official


def _heads(part: str, width: int, given: int | None, same: int | None, option: str) -> int:
    heads = given if given is not None else same or _HEADS_OF_WIDTH.get(width)
    if heads is None:
        raise UserError(f"the {part} is {width} wide, unlike MAR-B, L and H, and no shape tells its attention heads: give {option}")
    require(
        heads >= 1 and width % heads == 0,
        f"attention heads of the {part} ({option}) is {heads}; allowed: a divisor of its width {width}",
    )
    return heads


def config_from_official(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    classes: int | None = None,
    where: str = "the checkpoint",
) -> ModelConfig:
    """The sizes a state dict in the official layout implies.

    Args:
        heads, decoder_heads: attention heads, which no shape tells; known for the widths of B, L and H.
        classes: only checked against the state if given.
        where: the file's name in errors.

    Raises:
        UserError: a key that sizes are read from is missing or of another shape, or heads are neither given nor known.
    """
    missing = [k for k in _SIZED if k not in state]
    require(not missing, f"{where} is not a MAR: it lacks {', '.join(missing)}")
    for key, dimensions in _SIZED.items():
        shape = tuple(state[key].shape)
        require(len(shape) == dimensions, f"{where} is not a MAR: {key} is {shape}; {dimensions} dimensions are expected")
    width, dim = state["z_proj.weight"].shape
    positions = state["diffusion_pos_embed_learned"].shape[1]
    side = round(positions**0.5)
    require(side * side == positions, f"{where} has {positions} token positions, which are not a square grid")
    found = state["class_emb.weight"].shape[0]
    require(classes in (None, found), f"{where} has {found} classes, not {classes}")
    decoder_width = state["decoder_embed.weight"].shape[0]
    heads = _heads("encoder", width, heads, None, "--heads")
    same = heads if decoder_width == width else None
    decoder_heads = _heads("decoder", decoder_width, decoder_heads, same, "--decoder-heads")
    return ModelConfig(
        tokens=TokenSpec((side, side), dim),
        classes=found,
        order=MAROrderConfig(),
        backbone=MAEConfig(
            width=width,
            encoder_depth=_depth(state, "encoder_blocks"),
            heads=heads,
            decoder_width=0 if decoder_width == width else decoder_width,
            decoder_depth=_depth(state, "decoder_blocks"),
            decoder_heads=0 if decoder_heads == heads else decoder_heads,
            buffer=state["encoder_pos_embed_learned"].shape[1] - positions,
        ),
        head=DiffusionHeadConfig(
            width=state[_HEAD_PREFIX + "input_proj.weight"].shape[0],
            depth=_depth(state, _HEAD_PREFIX + "res_blocks"),
        ),
    )


def to_continuar(state: Mapping[str, Tensor], config: ModelConfig | DiTConfig, where: str = "the checkpoint") -> dict[str, Tensor]:
    """A state dict in the official layout as ours; dtypes are kept.

    Raises:
        UserError: lists every key that is missing, unexpected or of another shape; or dtypes differ where tensors are
            joined.
    """
    check_keys(state, official_shapes(config), where)
    ours = {b: state[a] for a, b in _names(config).items()}
    head = {k.removeprefix(_HEAD_PREFIX): v for k, v in state.items() if k.startswith(_HEAD_PREFIX)}
    ours |= {f"head.net.{k}": v for k, v in head_from_official(head).items()}
    for name in ("encoder_positions", "decoder_positions", "z_positions", "mask_token"):
        ours[f"backbone.{name}"] = ours[f"backbone.{name}"][0]
    ours["condition.embedding"] = _join(state, ["class_emb.weight", "fake_latent"])
    return separate(ours)


def to_official(state: Mapping[str, Tensor], config: ModelConfig | DiTConfig) -> dict[str, Tensor]:
    """The inverse of `to_continuar`.

    Raises:
        UserError: the config has a part of a kind that the official layout has no place for.
    """
    official = {a: state[b] for a, b in _names(config).items()}
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned", "mask_token"):
        official[name] = official[name][None]
    head = {k.removeprefix("head.net."): v for k, v in state.items() if k.startswith("head.net.")}
    official |= {_HEAD_PREFIX + k: v for k, v in head_to_official(head).items()}
    embedding = state["condition.embedding"]
    official["class_emb.weight"], official["fake_latent"] = embedding[: config.classes], embedding[config.classes :]
    return separate(official)


def official_shapes(config: ModelConfig | DiTConfig) -> dict[str, torch.Size]:
    """Every key of the official layout and its shape, for a model of this config; see `to_official` for errors."""
    official_parts(config)
    with torch.device("meta"):
        model = config.build()
    return {k: v.shape for k, v in to_official(model.state_dict(), config).items()}
