"""The sampling options of every head as command-line options, from the closed table of heads: a new head needs no line here."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from continuar.configs import kind_of, members
from continuar.heads import HeadOptions, option_names


def field_docs(config: type) -> dict[str, str]:
    """The string that stands behind each field of a dataclass, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for line, following in pairwise(definition.body):
        match line, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs


def _fields() -> list[tuple[str, Any, Any]]:
    """One optional field per option: name, type, default None; its help names the head it belongs to."""
    found: dict[str, tuple[str, Any, Any]] = {}
    for config in members(HeadOptions):
        hints, docs = typing.get_type_hints(config), field_docs(config)
        for name in option_names(config):
            assert name not in found, f"two heads have an option '{name}'"
            described = tyro.conf.arg(help=f"{kind_of(config)} head: {docs[name]}", help_behavior_hint="(default: the model's)")
            found[name] = (name, Annotated[hints[name] | None, described], None)
    return list(found.values())


if TYPE_CHECKING:

    class AnyHeadOptions:
        """Stands for the class below, which has as many fields as the heads have options."""
else:
    AnyHeadOptions = dataclasses.make_dataclass("AnyHeadOptions", _fields(), frozen=True)


def given(options: Any) -> dict[str, Any]:
    """The options that were given, by name."""
    return {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
