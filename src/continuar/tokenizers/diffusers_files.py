"""Reading autoencoders of diffusers: a directory with ``config.json`` and safetensors, or a repository of the Hugging Face hub.

1. Find the place: a directory (a whole pipeline's directory is entered by its ``vae`` folder), or a hub id.
2. Turn ``config.json`` into one of our network configs, and its scaling and shift factors into those of the tokenizer.
3. Read the weights. Every key and shape must fit. Only safetensors are read: nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from continuar.config import from_json
from continuar.errors import UserError, require, unknown_name
from continuar.tokenizers.networks import ConsistencyNetwork, DiffusersNetwork, NetworkConfig, VQNetwork, diffusers_class
from continuar.tokenizers.vae import VAEConfig, VAETokenizer
from continuar.tokenizers.vq import VQConfig, VQTokenizer

NETWORKS: dict[str, type[Any]] = {network.class_name: network for network in get_args(NetworkConfig)}
# Entries of a config.json that change neither latents nor images here: sizes seen in training, memory settings, how `VQModel`
# looks up ids, and the scale and shift, which belong to the tokenizer.
_UNUSED = {"sample_size", "force_upcast", "lookup_from_codebook", "latent_magnitude", "latent_shift"}
_UNUSED |= {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


def load_diffusers(
    source: str | Path, *, image_size: int = 256, patch: int = 1, ids: bool = False, scale: float | None = None
) -> VAETokenizer | VQTokenizer:
    """A tokenizer with the weights of a diffusers autoencoder.

    Args:
        source: a directory, or a hub id "owner/name" or "owner/name/folder".
        image_size: pixels; must be divisible by stride x patch.
        patch: side of the square of latents that makes one token.
        ids: for a VQModel, ids of the codebook instead of the vectors before quantisation.
        scale: multiplies latents; None takes ``scaling_factor`` of the autoencoder's config.

    Raises:
        UserError: not found, pickled weights, an unknown class or field, or keys that do not fit.
    """
    where, folder = _locate(str(source))
    network, own_scale, shift = network_from_diffusers(_read_config(where, folder), f"{source} config.json")
    if ids:
        if not isinstance(network, VQNetwork):
            raise UserError(f"{source} is an {network.class_name}, which has no ids; allowed: VQModel")
        require(patch == 1 and scale is None, f"patch {patch}, scale {scale} with ids; allowed: patch 1 and no scale")
        tokenizer = VQConfig(network=network, image_size=image_size).build()
    else:
        tokenizer = VAEConfig("vae", network, image_size, patch, own_scale if scale is None else scale, shift).build()
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
    for statistic in ("latents_mean", "latents_std"):
        require(values.get(statistic) is None, f"{where} has {statistic} per channel; allowed: one scaling_factor and shift_factor")
    options = {k: v for k, v in values.items() if not k.startswith("_") and k not in _UNUSED}
    if issubclass(kind, DiffusersNetwork):
        options.pop("block_out_channels", None)  # diffusers adds it to the config, but the constructors do not take it
        if kind is ConsistencyNetwork and "scaling_factor" in values:
            options["scaling_factor"] = values["scaling_factor"]  # its decoder divides latents by it
        options = {"options": options}
    network = from_json(NetworkConfig, {**options, "kind": NETWORKS[name].kind}, where)
    return network, _number(values, "scaling_factor", where), _number(values, "shift_factor", where)


def _number(values: Mapping[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    plain = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    require(plain, f"{name} of {where} is {value!r}; allowed: a number")
    return float(value or 0.0)


def _locate(source: str) -> tuple[str, str | None]:
    """(directory or hub repository, folder in it) of a source."""
    path = Path(source)
    if path.is_dir():
        inner = path / "vae"
        pipeline = not (path / "config.json").is_file() and (inner / "config.json").is_file()
        return str(inner if pipeline else path), None
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
            raise _unreadable(where, folder, problem) from problem
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON: {problem}") from problem
    require(isinstance(values, dict), f"{path} is not the config of an autoencoder")
    return values


def _weights(network: NetworkConfig, where: str, folder: str | None, source: str) -> dict[str, Any]:
    """The weights in float32."""
    if Path(where).is_dir():
        _check_files(Path(where))
    kind = diffusers_class(network.class_name)
    options = {"use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": False}
    try:
        # Read by diffusers, which knows the names that its older versions gave to attention layers.
        model, info = kind.from_pretrained(where, subfolder=folder, **options)
    except (OSError, ValueError) as problem:
        raise _unreadable(where, folder, problem) from problem
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


def _unreadable(where: str, folder: str | None, problem: Exception) -> UserError:
    return UserError(f"{where}{f'/{folder}' if folder else ''} cannot be read: {_line(problem)}; allowed: safetensors only")


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]
