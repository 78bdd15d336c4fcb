"""`UserError`: what was asked for cannot be done, as opposed to a bug, which keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked. The message is one line: the offending value, then what is allowed.

    The command line prints it without a traceback and exits with code 2; from Python it is a ``ValueError``.
    """


class RemoteRankError(UserError):
    """Another process of the run failed and has printed the reason."""


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def check_scale(name: str, value: float) -> None:
    """Refuses a guidance scale or temperature that is negative, infinite or NaN."""
    require(0 <= value < float("inf"), f"{name} is {value}; allowed: 0 or more, finite")


def check_sizes(prefix: str = "", **sizes: int) -> None:
    """Refuses sizes below 1; the message names them as ``prefix`` + name."""
    for name, value in sizes.items():
        require(value >= 1, f"{prefix}{name} is {value}; allowed: 1 or more")


def unknown_name(what: str, name: str, allowed: Iterable[str], shown: int = 12) -> UserError:
    """The error for a name that is not in a closed list: nearest names first, then what is allowed.

    Args:
        what: the kind of thing, as in "recipe".
        name: what was asked for.
        allowed: every valid name.
        shown: how many valid names the message lists at most.
    """
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if near and len(names) > shown:
        return UserError(f"unknown {what} '{name}'{hint} ({len(names)} are allowed)")
    listed = ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")
    return UserError(f"unknown {what} '{name}'{hint} (allowed: {listed or 'none'})")
