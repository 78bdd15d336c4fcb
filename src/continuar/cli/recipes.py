"""What commands that begin with a recipe's name have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from continuar.errors import require

Recipes = Mapping[str, Callable[[], Any]]


def split_recipe(arguments: list[str], command: str, help_text: str, listed: Recipes | None = None) -> tuple[str, list[str]] | None:
    """The recipe's name and the options behind it; None where only help or a list was asked for, which is printed.

    Args:
        command: how the user calls it, without the recipe.
        listed: recipes that --help and --list show.

    Raises:
        UserError: an option comes first.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{help_text}\n{list_recipes(listed)}" if listed else help_text, end="")
        return None
    if listed and arguments[0] == "--list":
        print(list_recipes(listed), end="")
        return None
    name, rest = arguments[0], arguments[1:]
    require(not name.startswith("-"), f"the recipe comes first, not '{name}': {command} RECIPE {name} ...")
    return name, rest


def list_recipes(recipes: Recipes) -> str:
    """One line per recipe: its name and the first line of its docstring."""
    width = max(map(len, recipes))
    return "recipes:\n" + "".join(f"  {n:<{width}}  {(inspect.getdoc(r) or '').splitlines()[0]}\n" for n, r in recipes.items())
