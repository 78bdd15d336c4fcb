"""Arguments to dataclasses, by tyro; a value that a dataclass refuses becomes its own one-line error."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from continuar.errors import UserError

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """An instance of the dataclass ``kind``; fields of ``default`` are what is not given.

    Raises:
        UserError: a value out of range.
        SystemExit: --help (0), or an option that does not exist (2); tyro has printed what to say.
    """
    config: tuple[Any, ...] = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    given: dict[str, Any] = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=arguments, prog=prog, description=description, config=config, **given)
    except SystemExit as stop:
        problem = _user_error(stop)
        if problem is not None:
            raise problem from None
        print(errors.getvalue(), end="", file=sys.stderr)
        raise


def _user_error(error: BaseException) -> UserError | None:
    """The `UserError` that an exception was raised while handling, if there is one."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause
