"""Autoencoders as diffusers keeps them: a directory with ``config.json`` and safetensors, or a repository of the Hugging Face hub.

Only safetensors are read: nothing is unpickled. Every key and shape must fit. A directory of a whole pipeline is entered by its
``vae`` folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from continuar.config import from_json
from continuar.errors import UserError, require, unknown_name
from continuar.tokenizers.networks import NetworkConfig, VQNetwork, diffusers_class
from continuar.tokenizers.vae import VAEConfig, VAETokenizer
from continuar.tokenizers.vq import VQConfig, VQTokenizer

NETWORKS: dict[str, type[Any]] = {network.class_name: network for network in get_args(NetworkConfig)}
# Fields that change neither latents nor images here: sizes seen in training, memory settings, and how `VQModel` looks up ids.
_NO_MATTER = {"sample_size", "force_upcast", "lookup_from_codebook", "latent_magnitude", "latent_shift"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


def load_diffusers(
    source: str | Path, *, image_size: int = 256, patch: int = 1, ids: bool = False, scale: float | None = None
) -> VAETokenizer | VQTokenizer:
    """A tokenizer with the weights of a diffusers autoencoder.

    Args:
        source: a directory, or a hub id "owner/name" or "owner/name/folder".
        image_size: pixels; must be divisible by stride x patch.
        patch: side of the square of latents that makes one token.
        ids: of a VQModel, ids of the codebook instead of the vectors before quantisation.
        scale: multiplies latents; None takes ``scaling_factor`` of the autoencoder's config.

    Raises:
        UserError: not found, pickled weights, an unknown class or field, or keys that do not fit.
    """
    where, folder = _locate(str(source))
    values = _read_config(where, folder)
    network, told, shift = network_from_diffusers(values, f"{source} config.json")
    if ids:
        if not isinstance(network, VQNetwork):
            raise UserError(f"{source} is an {network.class_name}, which has no ids; allowed: VQModel")
        require(patch == 1 and scale is None, f"patch {patch}, scale {scale} with ids; allowed: patch 1 and no scale")
        tokenizer = VQConfig(network=network, image_size=image_size).build()
    else:
        config = VAEConfig("vae", network, image_size, patch, told if scale is None else scale, shift)
        tokenizer = config.build()
    tokenizer.network.load_state_dict(_weights(network, where, folder, str(source)))
    return tokenizer


def network_from_diffusers(values: Mapping[str, Any], where: str) -> tuple[NetworkConfig, float, float]:
    """(network, scale, shift) for the content of a diffusers ``config.json``; a scale of 0 means that it names none.

    Raises:
        UserError: an unknown class, field or value.
    """
    name = values.get("_class_name")
    if name not in NETWORKS:
        raise unknown_name(f"autoencoder class in {where}", str(name), NETWORKS)
    kind = NETWORKS[name]
    known = {f.name for f in fields(kind)}
    for statistic in ("latents_mean", "latents_std"):
        require(values.get(statistic) is None, f"{where} has {statistic} per channel; allowed: one scaling_factor and shift_factor")
    scale, shift = values.get("scaling_factor"), values.get("shift_factor")
    ours = {k: v for k, v in values.items() if not k.startswith("_") and k not in _NO_MATTER}
    for elsewhere in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "block_out_channels"):
        if elsewhere not in known:
            ours.pop(elsewhere, None)
    stages = len(ours.get("encoder_block_out_channels", getattr(kind, "encoder_block_out_channels", ())))
    for field, hint in get_type_hints(kind).items():
        if get_origin(hint) is tuple and isinstance(ours.get(field), str):
            ours[field] = [ours[field]] * stages  # one for all stages
    network = from_json(kind, {**ours, "kind": kind.kind}, where)
    return network, _number(scale, "scaling_factor", where), _number(shift, "shift_factor", where)


def _number(value: Any, name: str, where: str) -> float:
    plain = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    require(plain, f"{name} of {where} is {value!r}; allowed: a number")
    return float(value or 0.0)


def _locate(source: str) -> tuple[str, str | None]:
    """(directory or hub repository, folder in it) of a source."""
    path = Path(source)
    if path.is_dir():
        inner = path / "vae"
        whole = not (path / "config.json").is_file() and (inner / "config.json").is_file()
        return str(inner if whole else path), None
    require(not path.exists(), f"{source} is a file; allowed: a directory or a hub id owner/name")
    is_hub = _HUB.fullmatch(source) is not None and not source.startswith((".", "/"))
    require(is_hub, f"{source} does not exist; allowed: a directory of an autoencoder, or a hub id owner/name")
    owner, name, *inside = source.split("/")
    return f"{owner}/{name}", "/".join(inside) or None


def _read_config(where: str, folder: str | None) -> dict[str, Any]:
    local = Path(where)
    if local.is_dir():
        path = local / "config.json"
        require(path.is_file(), f"{where} is not an autoencoder of diffusers: it has no config.json")
    else:
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(where, "config.json", subfolder=folder))
        except ImportError as problem:
            raise UserError("autoencoders of the hub need diffusers: pip install 'continuar[diffusers]'") from problem
        except (OSError, ValueError) as problem:
            raise _not_had(where, folder, problem) from problem
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}") from problem
    require(isinstance(values, dict), f"{path} is not the config of an autoencoder")
    return values


def _weights(network: NetworkConfig, where: str, folder: str | None, source: str) -> dict[str, Any]:
    """The weights in float32; diffusers knows the names that older versions of it gave to attention."""
    if Path(where).is_dir():
        _check_files(Path(where))
    kind = diffusers_class(network.class_name)
    options = {"use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": False}
    try:
        model, info = kind.from_pretrained(where, subfolder=folder, **options)
    except (OSError, ValueError) as problem:
        raise _not_had(where, folder, problem) from problem
    except RuntimeError as problem:
        raise UserError(f"{source} does not fit its config: {_line(problem)}") from problem
    found = [f"{n.removesuffix('_keys')} {', '.join(map(str, keys[:4]))}" for n, keys in info.items() if keys]
    require(not found, f"{source} does not fit its config: {'; '.join(found)}")
    return model.float().state_dict()


def _check_files(directory: Path) -> None:
    """Refuses pickled, missing and truncated weights."""
    files = sorted(directory.glob("*.safetensors"))
    pickled = ", ".join(p.name for p in sorted(directory.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    held = f"pickled weights ({pickled}), which are not read" if pickled else "no weights"
    require(bool(files), f"{directory} has {held}; allowed: safetensors")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as problem:
            raise UserError(f"{path} is truncated or damaged: {_line(problem)}") from problem


def _not_had(where: str, folder: str | None, problem: Exception) -> UserError:
    return UserError(f"{where}{f'/{folder}' if folder else ''} cannot be read: {_line(problem)}; allowed: safetensors only")


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]
