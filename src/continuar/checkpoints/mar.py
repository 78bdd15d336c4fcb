"""Official MAR checkpoint files (LTH14/mar, ``.pth``), both ways.

1. A file is {'model': ..., 'model_ema': ..., 'args': argparse.Namespace, ...}, or one bare state dict. None of its code is run.
2. Sizes come from the tensors' shapes. Attention heads, dropout and the tokenizer, which no shape tells, come from ``args``.
   Everything else in ``args`` must agree with the shapes.
3. Names map one to one with two exceptions: the head's adaLN projections are one matrix here and one per block there, and the null
   condition is the last row of the class embedding here and ``fake_latent`` there. So every official tensor is a range of rows of
   one of ours (`_table`).
4. Every key and shape is checked, and official -> ours -> official gives back every bit.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from continuar.checkpoints.store import (
    CONFIG,
    EMA,
    WEIGHTS,
    PipelineConfig,
    check_keys,
    check_replaceable,
    read_pipeline_config,
    separate,
)
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

# Official name: ours. A leaf is ``weight`` or ``bias``.
_LAYERS = {
    "z_proj": "token_embedding",
    "z_proj_ln": "backbone.input_norm",
    "encoder_norm": "backbone.encoder_norm",
    "decoder_norm": "backbone.decoder_norm",
    "decoder_embed": "backbone.decoder_input",
}
_BATCHED = {
    "encoder_pos_embed_learned": "backbone.encoder_positions",
    "decoder_pos_embed_learned": "backbone.decoder_positions",
    "diffusion_pos_embed_learned": "backbone.z_positions",
    "mask_token": "backbone.mask_token",
}
"""Parameters, not layers, that have a leading dimension of 1 there."""
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
_HEAD_PREFIX = "diffloss.net."
_HEAD = {
    "time_embed.mlp.0": "time.0",
    "time_embed.mlp.2": "time.2",
    "cond_embed": "condition",
    "input_proj": "input",
    "final_layer.linear": "output",
}
_HEAD_BLOCK = {"in_ln": "norm", "mlp.0": "mlp.0", "mlp.2": "mlp.2"}
_SIZED = {
    "z_proj.weight": 2,
    "encoder_pos_embed_learned": 3,
    "diffusion_pos_embed_learned": 3,
    "class_emb.weight": 2,
    "decoder_embed.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}
"""Keys that sizes are read from, and how many dimensions each has."""

MODELS = {"mar_base": (768, 12, 12), "mar_large": (1024, 16, 16), "mar_huge": (1280, 20, 16)}
"""(width, blocks, heads) of encoder and decoder alike, by the official name of the model."""
_HEADS_OF_WIDTH = {width: heads for width, _, heads in MODELS.values()}
_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
"""The best scale by width (paper, Section 4 and Table 4)."""
_TOKENIZER = {"img_size": 256, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 16}
"""The ``args`` that describe the tokenizer, with the official defaults."""
_AUTOENCODERS = {(16, 16): "kl16", (8, 4): "kl8", (1, 3): "pixels", (1, 1): "pixels"}
"""Names by (stride, channels)."""
_EARLY_CLASS_ROWS = 1000
"""Class embeddings that early official code made whatever ``class_num`` was (its issue 47)."""

Weights = Literal["ema", "raw"]
_ENTRY = {"ema": "model_ema", "raw": "model"}

Rows = tuple[str, str, slice]
"""(official name, our name, the rows of ours that the official tensor holds)."""
_ALL = slice(None)


# --- Weights ---


def _leaves(table: Mapping[str, str], theirs: str = "", ours: str = "") -> list[Rows]:
    return [(f"{theirs}{a}.{leaf}", f"{ours}{b}.{leaf}", _ALL) for a, b in table.items() for leaf in ("weight", "bias")]


def _head_table(depth: int, width: int, theirs: str = "", ours: str = "") -> list[Rows]:
    table = _leaves(_HEAD, theirs, ours)
    for i in range(depth):
        table += _leaves(_HEAD_BLOCK, f"{theirs}res_blocks.{i}.", f"{ours}blocks.{i}.")
        rows = slice(3 * width * i, 3 * width * (i + 1))  # shift, scale and gate
        table += [(a, b, rows) for a, b, _ in _leaves({"adaLN_modulation.1": "modulation"}, f"{theirs}res_blocks.{i}.", ours)]
    rows = slice(3 * width * depth, None)  # the output layer has no gate
    return table + [(a, b, rows) for a, b, _ in _leaves({"final_layer.adaLN_modulation.1": "modulation"}, theirs, ours)]


def _table(config: ModelConfig | DiTConfig) -> list[Rows]:
    """Every tensor of the official layout."""
    backbone, head = official_parts(config)
    table = _leaves(_LAYERS) + [(a, b, _ALL) for a, b in _BATCHED.items()]
    for part, depth in (("encoder", backbone.encoder_depth), ("decoder", backbone.decoder_depth)):
        for i in range(depth):
            table += _leaves(_BLOCK, f"{part}_blocks.{i}.", f"backbone.{part}.{i}.")
    table += _head_table(head.depth, head.width, _HEAD_PREFIX, "head.net.")
    null = config.classes
    embedding = "condition.embedding"
    return [*table, ("class_emb.weight", embedding, slice(null)), ("fake_latent", embedding, slice(null, None))]


def _join(state: Mapping[str, Tensor], table: list[Rows]) -> dict[str, Tensor]:
    """Our tensors from the official ones."""
    parts: dict[str, list[str]] = {}
    for theirs, ours, _ in table:
        parts.setdefault(ours, []).append(theirs)
    for first, *others in parts.values():
        for key in others:
            # One tensor has one dtype, so the way back could not restore two.
            a, b = state[first].dtype, state[key].dtype
            require(a == b, f"{first} is {a} and {key} {b}; they are joined, so one dtype is needed")
    return {ours: torch.cat([state[k] for k in keys]) if len(keys) > 1 else state[keys[0]] for ours, keys in parts.items()}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks ``prefix.0``, ``prefix.1``, ...; a gap is an error."""
    found = {int(m.group(1)) for k in state if (m := re.match(rf"{re.escape(prefix)}\.([0-9]+)\.", k))}
    lacking = next(i for i in range(len(found) + 1) if i not in found)
    require(lacking == len(found), f"{prefix}.{lacking} is missing, although there is {prefix}.{max(found, default=0)}")
    return lacking


def head_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A denoising MLP in the official layout (no prefix) as the state of `DenoisingMLP`."""
    return _join(state, _head_table(_depth(state, "res_blocks"), len(state["input_proj.weight"])))


def to_continuar(state: Mapping[str, Tensor], config: ModelConfig | DiTConfig, where: str = "the checkpoint") -> dict[str, Tensor]:
    """A state dict in the official layout as ours; dtypes are kept.

    Raises:
        UserError: keys are missing, unexpected or of another shape (all are listed), or tensors to join have several dtypes.
    """
    check_keys(state, official_shapes(config), where)
    return separate(_join({k: v[0] if k in _BATCHED else v for k, v in state.items()}, _table(config)))


def to_official(state: Mapping[str, Tensor], config: ModelConfig | DiTConfig) -> dict[str, Tensor]:
    """The inverse of `to_continuar`.

    Raises:
        UserError: the model has a part of a kind that the official layout has no place for.
    """
    official = {theirs: state[ours][rows] for theirs, ours, rows in _table(config)}
    return separate({k: v[None] if k in _BATCHED else v for k, v in official.items()})


def _our_tensors(config: ModelConfig | DiTConfig) -> dict[str, Tensor]:
    """The state of a model, without values."""
    with torch.device("meta"):
        return config.build().state_dict()


def official_shapes(config: ModelConfig | DiTConfig) -> dict[str, torch.Size]:
    """Every key of the official layout and its shape, for a model of this config; see `to_official` for errors."""
    official_parts(config)  # first, because what has no place there may not be buildable either
    return {k: v.shape for k, v in to_official(_our_tensors(config), config).items()}


# --- Configs ---


def official_parts(config: ModelConfig | DiTConfig) -> tuple[MAEConfig, DiffusionHeadConfig]:
    """(backbone, head) of a model that the official layout can hold.

    Raises:
        UserError: one of its parts is of another kind.
    """

    def check(part: str, kind: str, allowed: str) -> None:
        require(kind == allowed, f"{part} is '{kind}', which the official MAR layout has no place for; allowed: {allowed}")

    if isinstance(config, DiTConfig):
        raise UserError(
            "model is 'dit', which the official MAR layout has no place for; allowed: a model of order, backbone and head"
        )
    check("condition", config.condition.kind, LabelsConfig.kind)
    check("order", config.order.kind, MAROrderConfig.kind)
    check("backbone", config.backbone.kind, MAEConfig.kind)
    check("head", config.head.kind, DiffusionHeadConfig.kind)
    backbone, head = config.backbone, config.head
    assert isinstance(backbone, MAEConfig)
    assert isinstance(head, DiffusionHeadConfig)
    check("backbone.positions", backbone.positions, "learned")
    check("head.prediction", head.prediction, "epsilon")
    return backbone, head


def describe(config: ModelConfig | DiTConfig) -> str:
    """The sizes of a MAR in one line, for people."""
    b, head = official_parts(config)
    width = f"{b.width}" + (f" / {b.decoder_width}" if b.decoder_width else "")
    heads = f"{b.heads}" + (f" / {b.decoder_heads}" if b.decoder_heads else "")
    return f"width {width}, {b.encoder_depth} + {b.decoder_depth} blocks, {heads} heads; diffusion MLP {head.depth} x {head.width}"


def _heads(part: str, width: int, given: tuple[int | None, ...], option: str) -> int:
    """The first number of attention heads that is given, or that of the paper's model of this width."""
    heads = next((h for h in (*given, _HEADS_OF_WIDTH.get(width)) if h is not None), None)
    if heads is None:
        raise UserError(f"the {part} is {width} wide, unlike MAR-B, L and H, and no shape tells its attention heads: give {option}")
    allowed = f"allowed: a divisor of its width {width}"
    require(heads >= 1 and width % heads == 0, f"attention heads of the {part} ({option}) is {heads}; {allowed}")
    return heads


def config_from_official(
    state: Mapping[str, Tensor], *, heads: int | None = None, decoder_heads: int | None = None, where: str = "the checkpoint"
) -> ModelConfig:
    """The config that the shapes of a state dict in the official layout imply.

    Args:
        heads, decoder_heads: attention heads; known for the widths of MAR-B, L and H.
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
    decoder_width = len(state["decoder_embed.weight"])
    heads = _heads("encoder", width, (heads,), "--heads")
    same = heads if decoder_width == width else None
    decoder_heads = _heads("decoder", decoder_width, (decoder_heads, same), "--decoder-heads")
    return ModelConfig(
        tokens=TokenSpec((side, side), dim),
        classes=len(state["class_emb.weight"]),
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
            width=len(state[_HEAD_PREFIX + "input_proj.weight"]),
            depth=_depth(state, _HEAD_PREFIX + "res_blocks"),
        ),
    )


@dataclass(frozen=True)
class OfficialFile:
    """One set of weights of an official file, in its own layout, and its ``args`` (empty if it has none)."""

    path: Path
    state: dict[str, Tensor]
    args: dict[str, Any]
    entry: str
    """The entry that held the weights: "model_ema", "model", or "" for a bare state dict."""

    def number(self, name: str, default: Any, kind: type[int] | type[float] = int) -> Any:
        """``args.NAME``, or the default where there is none.

        Raises:
            UserError: it is of another type.
        """
        value = self.args.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        # type() and not isinstance(): True is no number of heads.
        fits = value is default or type(value) is kind
        require(fits, f"args.{name} of {self.path} is {_shown(value)}; {kind.__name__} is expected")
        return value

    def heads(self, name: str, option: str, given: int | None) -> int | None:
        """Attention heads by ``args`` (``name``, or those of a named model) or by the command line; None if neither has them."""
        _, _, of_model = MODELS.get(str(self.args.get("model")), (0, 0, None))
        heads = self.number(name, of_model)
        require(None in (heads, given) or heads == given, f"{option} is {given}, but args of {self.path} say {heads}")
        return heads if given is None else given


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
        heads=official.heads("encoder_num_heads", "--heads", heads),
        decoder_heads=official.heads("decoder_num_heads", "--decoder-heads", decoder_heads),
        where=str(official.path),
    )
    backbone, head = official_parts(config)
    backbone = replace(
        backbone,
        mask_ratio_min=official.number("mask_ratio_min", backbone.mask_ratio_min, float),
        attention_dropout=official.number("attn_dropout", backbone.attention_dropout, float),
        dropout=official.number("proj_dropout", backbone.dropout, float),
    )
    head = replace(head, diffusion_batch_mul=official.number("diffusion_batch_mul", head.diffusion_batch_mul))
    config = replace(config, backbone=backbone, head=head)
    tokenizer, notes = _tokenizer(official, config.tokens)
    guidance = _GUIDANCE.get(backbone.width, 3.0) if config.classes else 1.0
    sampling = SamplingOptions(steps=min(64, config.tokens.seq_len), guidance_scale=guidance)
    file = PipelineConfig(config, tokenizer, tuple(map(str, range(config.classes))), sampling)
    return file, notes + _check_args(official, file)


def _tokenizer(official: OfficialFile, tokens: TokenSpec) -> tuple[LatentConfig, tuple[str, ...]]:
    """The tokenizer that ``args`` describes; KL-16 if they do not and the tokens allow it."""
    if not _TOKENIZER.keys() & official.args.keys():
        lacking = f"and no args that tell their tokenizer: {', '.join(_TOKENIZER)}"
        require(tokens.dim == 16, f"{official.path} has tokens of dim {tokens.dim}, unlike KL-16, {lacking}")
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


def official_args(file: PipelineConfig) -> dict[str, Any]:
    """The official command-line and constructor arguments that a model implies, by their official names.

    Raises:
        UserError: the model is not a MAR, or its tokens are neither latents nor pixels.
    """
    backbone, head = official_parts(file.model)
    encoder = (backbone.width, backbone.encoder_depth, backbone.heads)
    decoder = (backbone.decoder_width or backbone.width, backbone.decoder_depth, backbone.decoder_heads or backbone.heads)
    names = [name for name, known in MODELS.items() if encoder == decoder == known]
    args: dict[str, Any] = {"model": names[0]} if names else {}
    for part, values in (("encoder", encoder), ("decoder", decoder)):
        args |= {f"{part}_{k}": v for k, v in zip(("embed_dim", "depth", "num_heads"), values, strict=True)}
    # latent_scale is ours: official code has 0.2325 written into it.
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
        found = args.get(name, value)
        agrees = isinstance(found, int | float | str) and found == value
        require(agrees, f"args.{name} of {official.path} is {_shown(found)}, but its tensors say: {value}")
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


# --- Files ---


def _shown(value: object) -> str:
    """A value from a file, in at most one line."""
    return " ".join(repr(value).split())[:80]


def read_official(path: Path, weights: Weights = "ema") -> OfficialFile:
    """Reads one set of weights of an official file, mapped from the disk rather than copied.

    Raises:
        UserError: missing, damaged, of another format, with anything but plain tensors in it, or without these weights.
    """
    content = load_torch_file(path)
    require(isinstance(content, dict), f"{path} holds a {type(content).__name__}; a dict with 'model_ema' is expected")
    bare = content and all(isinstance(v, Tensor) for v in content.values())
    entry = "" if bare else _ENTRY[weights]
    usable = [e for e in _ENTRY.values() if isinstance(content.get(e), dict) and content[e]]
    if entry and entry not in usable:
        held = ", ".join(_shown(k).strip("'") for k in [*content][:12] if content[k] is not None)
        hint = "; --weights raw takes 'model'" if "model" in usable else ""
        raise UserError(f"{path} has no weights '{entry}'; it holds: {held or 'nothing'}{hint}")
    args = content.get("args") if entry else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    require(args is None or isinstance(args, dict), f"'args' of {path} is a {type(args).__name__}, not a Namespace")
    state = _tensors(content[entry] if entry else content, path)
    return OfficialFile(path, state, {k: v for k, v in (args or {}).items() if v is not None}, entry)


def _tensors(state: Mapping[Any, Any], where: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, without the prefix that DistributedDataParallel gives to all names."""
    for k, v in state.items():
        plain = isinstance(v, Tensor) and v.is_floating_point() and v.layout == torch.strided and v.device.type == "cpu"
        named = isinstance(k, str) and k.isprintable()
        require(named and plain, f"{where}: {_shown(k)} is not a plain tensor of floating-point numbers")
    prefix = "module." if all(k.startswith("module.") for k in state) else ""
    return {k.removeprefix(prefix): v.detach() for k, v in state.items()}


def write_official(
    path: Path, file: PipelineConfig, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], *, overwrite: bool = False
) -> int:
    """Writes two sets of weights (in our layout; may be one and the same) as an official file, all of it or nothing.

    Returns:
        The number of tensors of a set.

    Raises:
        UserError: the file exists or cannot be written; weights do not fit the config; the model is not a MAR.
    """
    check_file(path, overwrite)
    args = official_args(file)
    shapes = {k: v.shape for k, v in _our_tensors(file.model).items()}
    for state in (model, ema):
        check_keys(state, shapes, "the source")
    layout = to_official(model, file.model)
    average = layout if ema is model else to_official(ema, file.model)
    with write_errors(path), atomic_file(path) as handle:
        torch.save({"model": layout, "model_ema": average, "args": argparse.Namespace(**args)}, handle)
    return len(layout)


@dataclass(frozen=True)
class Converted:
    """The result of a conversion, for people."""

    file: PipelineConfig
    state: Mapping[str, Tensor]
    """Weights in our layout; of two sets, the raw ones."""
    tensors: int
    """The number of tensors of one set of weights in the official layout."""
    weights: str
    """Which weights were taken."""
    notes: tuple[str, ...]
    """What was assumed, or has no place in the other format."""


def import_official(
    source: Path, destination: Path, *, weights: Weights = "ema", heads: int | None = None, decoder_heads: int | None = None
) -> Converted:
    """Writes an official checkpoint file as a saved model, which replaces a saved model at ``destination``.

    Args:
        weights: "ema" or "raw"; a bare state dict has one set, which is taken either way.
        heads, decoder_heads: attention heads, where neither the width nor the file's ``args`` tell them.

    Raises:
        UserError: unreadable, not a MAR, contradictory, or the destination cannot be written; nothing is left behind.
    """
    inside = destination.resolve() in source.resolve().parents
    require(
        not inside or not destination.exists(), f"{source} lies in {destination}, which would be replaced; choose another directory"
    )
    check_replaceable(destination)
    official = read_official(source, weights)
    file, notes = model_file(official, heads=heads, decoder_heads=decoder_heads)
    ours = to_continuar(official.state, file.model, str(source))
    with write_errors(destination), atomic_directory(destination) as temporary:
        write_json(temporary / CONFIG, file)
        write_tensors(temporary / WEIGHTS, ours)
    return Converted(file, ours, len(official.state), official.entry or "a bare state dict", notes)


def export_official(source: Path, destination: Path, *, weights: Weights = "ema", overwrite: bool = False) -> Converted:
    """Writes a saved model or a training checkpoint as an official file.

    Sampling settings, class names and ``backbone.mask_granularity`` have no place there and are left out.

    Args:
        weights: "ema": raw weights as 'model', their EMA as 'model_ema'; "raw": raw weights as both.
        overwrite: an existing file is replaced.

    Raises:
        UserError: the source cannot be read; or see `write_official`.
    """
    check_file(destination, overwrite)
    file, model, notes = read_pipeline_config(source), read_tensors(source / WEIGHTS), []
    if (scale := latent_sizes(file)[-1]) != LatentConfig.scale:
        notes.append(f"tokens are latents x {scale:.6g}; official code has x {LatentConfig.scale} written into it")
    if weights == "ema" and (source / EMA).is_file():
        ema, taken = read_tensors(source / EMA), f"{WEIGHTS} as 'model', {EMA} as 'model_ema'"
    else:
        ema, taken = model, f"{WEIGHTS} as 'model' and 'model_ema'"
        if weights == "ema":
            notes.append("the source has one set of weights: 'model' and 'model_ema' both hold it")
    tensors = write_official(destination, file, model, ema, overwrite=overwrite)
    return Converted(file, model, tensors, taken, tuple(notes))
