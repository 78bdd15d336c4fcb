"""What an official file's ``args`` say, and what a model of ours would have there.

Sizes come from the tensors' shapes; attention heads, dropout and the autoencoder, which no shape tells, come from ``args``; and
whatever else ``args`` say must agree with the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from continuar.checkpoints.mar import MODELS, config_from_official, describe, official_parts
from continuar.checkpoints.store import ModelFile
from continuar.errors import UserError, require
from continuar.generation.plan import SamplingOptions
from continuar.tokenizers import LatentConfig, PixelConfig, TokenSpec, VAEConfig

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
) -> tuple[ModelFile, tuple[str, ...]]:
    """The config of a saved model for an official file, and notes on what had to be assumed.

    Args:
        heads, decoder_heads: see `import_official`.

    Raises:
        UserError: ``args`` and shapes contradict each other, or both leave something open.
    """
    config = config_from_official(
        official.state,
        heads=_heads(official, "encoder_num_heads", heads, "--heads"),
        decoder_heads=_heads(official, "decoder_num_heads", decoder_heads, "--decoder-heads"),
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
        head=replace(head, timesteps_per_token=official.number("diffusion_batch_mul", head.timesteps_per_token)),
    )
    tokenizer, notes = _tokenizer(official, config.tokens)
    guidance = _GUIDANCE.get(backbone.width, 3.0) if config.classes else 1.0
    sampling = SamplingOptions(steps=min(64, config.tokens.positions), guidance=guidance)
    file = ModelFile(config, tokenizer, tuple(map(str, range(config.classes))), sampling)
    return file, notes + _check_args(official, file)


def official_args(file: ModelFile) -> dict[str, Any]:
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
        "diffusion_batch_mul": head.timesteps_per_token,
    }


def shown(value: object) -> str:
    """What a file holds, fit for a line."""
    return " ".join(repr(value).split())[:80]


def _heads(official: OfficialFile, name: str, given: int | None, option: str) -> int | None:
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


def _check_args(official: OfficialFile, file: ModelFile) -> tuple[str, ...]:
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


def latent_sizes(file: ModelFile) -> tuple[int, int, int, int, float]:
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
