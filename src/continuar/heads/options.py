"""What every head's sampling options share. Each head's file declares its own, with a literal ``kind``."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from continuar.errors import UserError
from continuar.guidance import check_scale

T = TypeVar("T", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to draw a token, besides temperature and guidance: those are tensors beside it, because a captured graph would bake in
    a number."""

    def check_temperature(self, temperature: float) -> None:
        """Refuses a temperature that the head cannot apply."""
        check_scale("temperature", temperature)

    def check_tokens(self, size: int) -> None:
        """Refuses options that do not fit tokens of ``size`` dimensions, or ids of that many."""


def option_names(kind: type[Options]) -> list[str]:
    """The names of a head's options."""
    return [f.name for f in dataclasses.fields(kind) if f.name != "kind"]


def with_values(options: T, values: dict[str, Any]) -> T:
    """The options with some values replaced.

    Raises:
        UserError: an option this head does not have.
    """
    allowed = option_names(type(options))
    for name, value in values.items():
        if name not in allowed:
            raise UserError(
                f"{name} is {value}, an option that the {getattr(options, 'kind', '')} head does not have; "
                f"allowed: {', '.join(allowed) or 'none'}"
            )
    return dataclasses.replace(options, **values)
