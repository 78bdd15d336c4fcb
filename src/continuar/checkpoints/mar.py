"""The official MAR key layout (LTH14/mar), both ways, every key and shape checked.

Names map one to one but for two things: the head's adaLN projections are one matrix here and one per block there, and
the null condition is the last row of the class embedding here and the parameter ``fake_latent`` there.

What an official file's ``args`` say, and what a model of ours would have there.

Sizes come from the tensors' shapes; attention heads, dropout and the autoencoder, which no shape tells, come from ``args``; and
whatever else ``args`` say must agree with the shapes.

Official MAR checkpoint files (``.pth``), both ways. The key layout itself is in `mar`.

1. Reading runs nothing that a file holds: tensors, plain values and ``argparse.Namespace`` are all that is let in.
2. Sizes come from the tensors' shapes. What no shape tells (attention heads, dropout, the autoencoder) comes from the
   file's ``args``; whatever else ``args`` says must agree with the shapes.
3. Writing is the same backwards, so that official -> ours -> official gives back every bit.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from continuar.checkpoints.store import CONFIG, EMA, WEIGHTS, PipelineConfig, check_keys, read_pipeline_config
from continuar.errors import UserError, require
from continuar.heads import DiffusionHeadConfig
from continuar.io import (
    atomic_directory,
    atomic_file,
    check_file,
    load_torch_file,
    read_tensors,
    write_errors,
    write_json,
    write_tensors,
)
from continuar.models import MAEConfig
from continuar.models.autoregressive import ModelConfig
from continuar.models.conditions import LabelsConfig
from continuar.models.dit import DiTConfig
from continuar.orders import MAROrderConfig
from continuar.sampling.options import SamplingOptions
from continuar.tokenizers import LatentConfig, PixelConfig, TokenSpec, VAEConfig

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
    if head.prediction != "epsilon":
        raise _no_place("head.prediction", head.prediction, "epsilon")
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


_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
"""The best scale by width (paper, Section 4 and Table 4)."""
_TOKENIZER = {"img_size": 256, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 16}
"""What ``args`` tells of the tokenizer, with the official defaults."""
_AUTOENCODERS = {(16, 16): "kl16", (8, 4): "kl8", (1, 3): "pixels", (1, 1): "pixels"}
"""Names by (stride, channels)."""
_EARLY_CLASS_ROWS = 1000
"""Class embeddings that early official code made whatever ``class_num`` was (its issue 47)."""


@dataclass(frozen=True)
class OfficialFile:
    """One set of weights of an official file, in its own layout, and what its ``args`` say (empty if it has none)."""

    path: Path
    state: dict[str, Tensor]
    args: dict[str, Any]
    entry: str
    """Where the weights were: "model_ema", "model", or "" for a bare state dict."""

    def number(self, name: str, default: Any, kind: type[int] | type[float] = int) -> Any:
        """``args.NAME``, or the default where there is none.

        Raises:
            UserError: it is of another type.
        """
        value = self.args.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        fits = value is default or type(value) is kind
        require(fits, f"args.{name} of {self.path} is {shown(value)}; {kind.__name__} is expected")
        return value


def model_file(
    official: OfficialFile, *, heads: int | None = None, decoder_heads: int | None = None
) -> tuple[PipelineConfig, tuple[str, ...]]:
    """The config of a saved model for an official file, and notes on what had to be assumed.

    Args:
        heads, decoder_heads: see `import_official`.

    Raises:
        UserError: ``args`` and shapes contradict each other, or both leave something open.
    """
    config = config_from_official(
        official.state,
        heads=_heads_of_arguments(official, "encoder_num_heads", heads, "--heads"),
        decoder_heads=_heads_of_arguments(official, "decoder_num_heads", decoder_heads, "--decoder-heads"),
        where=str(official.path),
    )
    backbone, head = official_parts(config)
    config = replace(
        config,
        backbone=replace(
            backbone,
            mask_ratio_min=official.number("mask_ratio_min", backbone.mask_ratio_min, float),
            attention_dropout=official.number("attn_dropout", backbone.attention_dropout, float),
            dropout=official.number("proj_dropout", backbone.dropout, float),
        ),
        head=replace(head, diffusion_batch_mul=official.number("diffusion_batch_mul", head.diffusion_batch_mul)),
    )
    tokenizer, notes = _tokenizer(official, config.tokens)
    guidance = _GUIDANCE.get(backbone.width, 3.0) if config.classes else 1.0
    sampling = SamplingOptions(steps=min(64, config.tokens.seq_len), guidance_scale=guidance)
    file = PipelineConfig(config, tokenizer, tuple(map(str, range(config.classes))), sampling)
    return file, notes + _check_args(official, file)


def official_args(file: PipelineConfig) -> dict[str, Any]:
    """The official command-line and constructor arguments that a model implies, by their official names.

    ``latent_scale`` alone is not one of them: official code has 0.2325 written into it.

    Raises:
        UserError: the model is not a MAR, or its tokens are neither latents nor pixels.
    """
    backbone, head = official_parts(file.model)
    encoder = (backbone.width, backbone.encoder_depth, backbone.heads)
    width, heads = backbone.decoder_width or backbone.width, backbone.decoder_heads or backbone.heads
    decoder = (width, backbone.decoder_depth, heads)
    names = [name for name, known in MODELS.items() if encoder == decoder == known]
    args: dict[str, Any] = {"model": names[0]} if names else {}
    for part, values in (("encoder", encoder), ("decoder", decoder)):
        args |= {f"{part}_{k}": v for k, v in zip(("embed_dim", "depth", "num_heads"), values, strict=True)}
    args |= zip((*_TOKENIZER, "latent_scale"), latent_sizes(file), strict=True)
    return args | {
        "class_num": file.model.classes,
        "mask_ratio_min": backbone.mask_ratio_min,
        "attn_dropout": backbone.attention_dropout,
        "proj_dropout": backbone.dropout,
        "buffer_size": backbone.buffer,
        "diffloss_d": head.depth,
        "diffloss_w": head.width,
        "diffusion_batch_mul": head.diffusion_batch_mul,
    }


def shown(value: object) -> str:
    """What a file holds, fit for a line."""
    return " ".join(repr(value).split())[:80]


def _heads_of_arguments(official: OfficialFile, name: str, given: int | None, option: str) -> int | None:
    """Attention heads as ``args`` or the option say; None if neither does."""
    _, _, usual = MODELS.get(str(official.args.get("model")), (0, 0, None))
    told = official.number(name, usual)
    require(None in (told, given) or told == given, f"{option} is {given}, but args of {official.path} say {told}")
    return told if given is None else given


def _tokenizer(official: OfficialFile, tokens: TokenSpec) -> tuple[LatentConfig, tuple[str, ...]]:
    """The tokenizer that ``args`` describes; KL-16 if they do not and the tokens allow it."""
    if not _TOKENIZER.keys() & official.args.keys():
        require(
            tokens.dim == 16,
            f"{official.path} has tokens of dim {tokens.dim}, unlike KL-16, and no args that tell their tokenizer: "
            + ", ".join(_TOKENIZER),
        )
        assumed = LatentConfig(image_size=16 * tokens.grid[0])
        return assumed, (f"args name no tokenizer; assumed: KL-16, images of {assumed.image_size} pixels",)
    size, stride, patch, channels = (official.number(k, default) for k, default in _TOKENIZER.items())
    name = _AUTOENCODERS.get((stride, channels), f"f{stride}d{channels}")
    scale = official.number("latent_scale", LatentConfig.scale, float)
    tokenizer = LatentConfig("latent", name, size, stride, channels, patch, scale)
    require(
        tokenizer.spec == tokens,
        f"args of {official.path} (img_size {size}, vae_stride {stride}, patch_size {patch}, vae_embed_dim {channels}) "
        f"mean {tokenizer.spec}, its tensors have {tokens}",
    )
    return tokenizer, ()


def _check_args(official: OfficialFile, file: PipelineConfig) -> tuple[str, ...]:
    """Refuses ``args`` that contradict the model; returns notes on what is only odd."""
    args, expected, notes = official.args, official_args(file), ()
    if str(args.get("model")) in MODELS:
        expected.setdefault("model", describe(file.model))
    else:
        expected.pop("model", None)
    rows, count = file.model.classes, args.get("class_num")
    if rows == _EARLY_CLASS_ROWS and type(count) is int and 0 < count < rows:
        notes = (f"args.class_num is {count}, but there are {rows} class embeddings; all are kept",)
        del expected["class_num"]
    for name, value in expected.items():
        told = args.get(name, value)
        agrees = isinstance(told, int | float | str) and told == value
        require(agrees, f"args.{name} of {official.path} is {shown(told)}, but its tensors say: {value}")
    return notes


def latent_sizes(file: PipelineConfig) -> tuple[int, int, int, int, float]:
    """(image size, stride, patch, channels, scale) of the tokenizer; pixels are latents of stride 1."""
    t = file.tokenizer
    if isinstance(t, LatentConfig):
        return t.image_size, t.stride, t.patch, t.channels, t.scale
    if isinstance(t, PixelConfig):
        require(t.std > 0, "tokenizer.std is 0: pixels have not been measured yet")
        return t.image_size, 1, t.patch, t.channels, 1 / t.std
    if isinstance(t, VAEConfig):
        require(t.shift == 0, f"tokenizer.shift is {t.shift}, which the official layout has no place for; allowed: 0")
        return t.image_size, t.network.stride, t.patch, t.network.channels, t.scale
    raise UserError(f"tokenizer is '{t.kind}', which the official layout has no place for; allowed: latent, pixel, vae")


Weights = Literal["ema", "raw"]
_ENTRY = {"ema": "model_ema", "raw": "model"}


@dataclass(frozen=True)
class Converted:
    """What a conversion did, for people."""

    file: PipelineConfig
    state: Mapping[str, Tensor]
    """Weights in our layout; of two sets, the raw ones."""
    tensors: int
    """How many tensors a set of weights has in the official layout."""
    weights: str
    """Which weights were taken."""
    notes: tuple[str, ...]
    """What was assumed, or has no place in the other format."""


def import_official(
    source: Path,
    destination: Path,
    *,
    weights: Weights = "ema",
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Converted:
    """Writes an official checkpoint file as a saved model. A saved model at ``destination`` is replaced at once.

    Args:
        weights: "ema" or "raw"; of a bare state dict, its only set either way.
        heads, decoder_heads: attention heads, where neither the width nor the file's ``args`` tell them.

    Raises:
        UserError: unreadable, not a MAR, contradictory, or the destination cannot be written; nothing is left behind.
    """
    destination = Path(os.path.abspath(destination))
    _check_directory(destination, source)
    official = read_official(source, weights)
    file, notes = model_file(official, heads=heads, decoder_heads=decoder_heads)
    ours = to_continuar(official.state, file.model, str(source))
    with write_errors(destination), atomic_directory(destination) as temporary:
        write_json(temporary / CONFIG, file)
        write_tensors(temporary / WEIGHTS, ours)
    return Converted(file, ours, len(official.state), official.entry or "a bare state dict", notes)


def export_official(source: Path, destination: Path, *, weights: Weights = "ema", overwrite: bool = False) -> Converted:
    """Writes a saved model or a training checkpoint as an official file.

    Not everything has a place there: sampling settings, class names and ``backbone.mask_granularity`` are left out.

    Args:
        weights: "ema": raw weights as 'model', their EMA as 'model_ema'; "raw": raw weights as both.
        overwrite: an existing file is replaced.

    Raises:
        UserError: the source cannot be read; or see `write_official`.
    """
    check_file(destination, overwrite)
    file = read_pipeline_config(source)
    model = read_tensors(source / WEIGHTS)
    scale = latent_sizes(file)[-1]
    notes = [f"tokens are latents x {scale:.6g}; official code has x {LatentConfig.scale} written into it"]
    notes = notes if scale != LatentConfig.scale else []
    if weights == "ema" and (source / EMA).is_file():
        ema, taken = read_tensors(source / EMA), f"{WEIGHTS} as 'model', {EMA} as 'model_ema'"
    else:
        ema, taken = model, f"{WEIGHTS} as 'model' and 'model_ema'"
        if weights == "ema":
            notes.append("the source has one set of weights: 'model' and 'model_ema' both hold it")
    tensors = write_official(destination, file, model, ema, overwrite=overwrite)
    return Converted(file, model, tensors, taken, tuple(notes))


def read_official(path: Path, weights: Weights = "ema") -> OfficialFile:
    """Reads one set of weights of an official file, mapped from the disk rather than copied.

    Raises:
        UserError: missing, damaged, of another format, with anything but plain tensors in it, or without these weights.
    """
    require(weights in _ENTRY, f"weights is '{weights}'; allowed: {', '.join(_ENTRY)}")
    content = load_torch_file(path)
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}; a dict with 'model_ema' is expected")
    entry, state = _select(content, weights, path)
    args = content.get("args") if entry else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    require(args is None or isinstance(args, dict), f"'args' of {path} is a {type(args).__name__}, not a Namespace")
    return OfficialFile(path, _tensors(state, path), {k: v for k, v in (args or {}).items() if v is not None}, entry)


def write_official(
    path: Path, file: PipelineConfig, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], *, overwrite: bool = False
) -> int:
    """Writes two sets of weights (in our layout; may be one and the same) as an official file, all of it or nothing.

    Returns:
        how many tensors a set has there.

    Raises:
        UserError: the file exists or cannot be written; weights do not fit the config; the model is not a MAR.
    """
    check_file(path, overwrite)
    args = official_args(file)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in file.model.build().state_dict().items()}
    for state in (model, ema):
        check_keys(state, shapes, "the source")
    layout = to_official(model, file.model)
    average = layout if ema is model else to_official(ema, file.model)
    with write_errors(path), atomic_file(path) as handle:
        torch.save({"model": layout, "model_ema": average, "args": argparse.Namespace(**args)}, handle)
    return len(layout)


def _select(content: dict[Any, Any], weights: Weights, where: Path) -> tuple[str, Mapping[Any, Any]]:
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return "", content
    usable = [e for e in _ENTRY.values() if isinstance(content.get(e), dict) and content[e]]
    if _ENTRY[weights] in usable:
        return _ENTRY[weights], content[_ENTRY[weights]]
    held = ", ".join(shown(k).strip("'") for k in [*content][:12] if content[k] is not None)
    hint = "; --weights raw takes 'model'" if "model" in usable else ""
    raise UserError(f"{where} has no weights '{_ENTRY[weights]}'; it holds: {held or 'nothing'}{hint}")


def _tensors(state: Mapping[Any, Any], where: Path) -> dict[str, Tensor]:
    """A state dict's tensors, without the prefix that DistributedDataParallel gives to all names."""
    for k, v in state.items():
        plain = isinstance(v, Tensor) and v.is_floating_point() and v.layout == torch.strided and v.device.type == "cpu"
        named = isinstance(k, str) and k.isprintable()
        require(named and plain, f"{where}: {shown(k)} is not a plain tensor of floating-point numbers")
    prefix = "module." if all(k.startswith("module.") for k in state) else ""
    return {k.removeprefix(prefix): v.detach() for k, v in state.items()}


def _check_directory(destination: Path, source: Path) -> None:
    """Only an empty directory or a saved model may be replaced; a run directory has a config, too, but no weights."""
    require(not destination.exists() or destination.is_dir(), f"{destination} is a file; a saved model is a directory")
    saved = (destination / CONFIG).is_file() and (destination / WEIGHTS).is_file()
    free = saved or not destination.exists() or not any(destination.iterdir())
    require(free, f"{destination} exists and is not a saved model; choose another directory")
    inside = destination.resolve() in source.resolve().parents
    require(not inside, f"{source} lies in {destination}, which would be replaced; choose another directory")
