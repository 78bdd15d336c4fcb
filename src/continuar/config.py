"""Frozen dataclass configs to JSON and back.

A union of configs is told apart by its literal ``kind`` field, so the closed set of kinds is the type annotation itself: JSON never
names an import path, and an unknown kind or field is an error that says what is allowed. One member of a union may have no kind.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from continuar.errors import UserError, unknown_name

T = TypeVar("T")


def to_json(config: Any) -> Any:
    """A config (or tuple, dict, path of such) as plain JSON values, every field included."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(v) for v in config]
    if isinstance(config, dict):
        return {k: to_json(v) for k, v in config.items()}
    if isinstance(config, Path):
        return str(config)
    return config


def from_json(kind: type[T] | Any, value: Any, where: str = "config") -> T:
    """The inverse of `to_json` for the annotated type ``kind``.

    Raises:
        UserError: an unknown or missing field, an unknown ``kind``, or a value of another type; ``where`` names the place.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return typing.cast(T, _dataclass_from_json(kind, value, where))
    if origin in (typing.Union, types.UnionType):
        return _union_from_json(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise unknown_name(where, str(value), [str(a) for a in args])
        return typing.cast(T, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; a list is expected")
        each = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(each) != len(value):
            raise UserError(f"{where} has {len(value)} entries; {len(each)} are expected")
        return typing.cast(T, tuple(from_json(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(each, value, strict=True))))
    if origin is dict and isinstance(value, dict):
        return typing.cast(T, value)  # plain JSON values, which whoever takes them checks
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return typing.cast(T, float(value))
    if kind is Path and isinstance(value, str):
        return typing.cast(T, Path(value))
    if kind is type(None) and value is None:
        return typing.cast(T, None)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return typing.cast(T, value)
    raise UserError(f"{where} is {value!r}; {getattr(kind, '__name__', kind)} is expected")


def _dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; an object with the fields of {kind.__name__} is expected")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise unknown_name(f"field of {where}", name, fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise UserError(f"{where} lacks the field '{name}'")
    return kind(**{name: from_json(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def _union_from_json(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    plain = [o for o in options if o is not type(None)]
    if isinstance(value, dict):
        kinds = {kind_of(o): o for o in plain if hasattr(o, "kind")}
        kindless = [o for o in plain if dataclasses.is_dataclass(o) and not hasattr(o, "kind")]
        if kindless and "kind" not in value:
            return from_json(kindless[0], value, where)
        if kinds:
            kind = value.get("kind")
            if kind not in kinds:
                raise unknown_name(f"kind of {where}", str(kind), kinds)
            return from_json(kinds[kind], value, where)
    if len(plain) == 1:
        return from_json(plain[0], value, where)
    for option in plain:
        if isinstance(option, type) and isinstance(value, option) and not isinstance(value, bool):
            return from_json(option, value, where)
    raise UserError(f"{where} is {value!r}; expected one of {', '.join(getattr(o, '__name__', str(o)) for o in plain)}")


def members(table: Any) -> tuple[Any, ...]:
    """The classes of a closed table: a union's members, or the only one."""
    return typing.get_args(table) or (table,)


def kind_of(config_class: Any) -> str:
    """The literal ``kind`` of a config class."""
    return typing.get_args(typing.get_type_hints(config_class)["kind"])[0]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line each: ``optim.lr: 0.0001 -> 0.0002``."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


# Old name -> today's, for fields of any config; a new field must not take a name on the left.
RENAMED_FIELDS = {
    "timesteps_per_token": "diffusion_batch_mul",
    "recompute": "activation_checkpointing",
    "guidance": "guidance_scale",
}
# Field -> {old value: today's}.
RENAMED_VALUES = {
    "prediction": {"eps": "epsilon", "velocity": "v_prediction"},
    "sampler": {"dpmpp": "dpmpp_2m", "dpmpp-sde": "dpmpp_2m_sde"},
}
NETWORKS_WITH_OPTIONS = ("tiny", "dc", "consistency")
"""Kinds of autoencoder networks that had one field per argument."""


def rename_old_fields(value: Any) -> Any:
    """The JSON of a config with the names of version 0.1.0 replaced by today's.

    It is for JSON that holds a config (`io.read_config`): in other JSON these names may be data.
    """
    if isinstance(value, list):
        return [rename_old_fields(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.get("kind") in NETWORKS_WITH_OPTIONS and "options" not in value:
        return {"kind": value["kind"], "options": {k: v for k, v in value.items() if k != "kind"}}
    renamed = {RENAMED_FIELDS.get(k, k): rename_old_fields(v) for k, v in value.items()}
    for name, values in RENAMED_VALUES.items():
        if isinstance(renamed.get(name), str):
            renamed[name] = values.get(renamed[name], renamed[name])
    return renamed
