"""Recipes: one Python function per run. `RECIPES` is the closed table of those for models, `TOKENIZER_RECIPES` for tokenizers.

A recipe's docstring says what is trained, then holds its command, and the result where it was measured. Any field can be
overridden on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from continuar.errors import unknown_name
from continuar.recipes.comparison import ar_vq_cifar10, comparison_recipes, dit_cifar10, dit_digits, mar_kl_cifar10
from continuar.recipes.images import (
    cifar10,
    digits,
    folder,
    folder_gpu,
    mar_b_imagenet256,
    mar_h_imagenet256,
    mar_l_imagenet256,
    mar_l_imagenet256_ablation,
)
from continuar.recipes.tokenizers import TOKENIZER_RECIPES
from continuar.training.config import BaseRun

__all__ = ["RECIPES", "TOKENIZER_RECIPES", "Recipes", "find_recipe"]

Recipes = Mapping[str, Callable[[], Any]]
R = TypeVar("R")

RECIPES: dict[str, Callable[[], BaseRun]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        folder,
        folder_gpu,
        cifar10,
        mar_kl_cifar10,
        ar_vq_cifar10,
        dit_digits,
        dit_cifar10,
        mar_b_imagenet256,
        mar_l_imagenet256,
        mar_h_imagenet256,
        mar_l_imagenet256_ablation,
        *comparison_recipes(),
    )
}


def find_recipe(name: str, recipes: Mapping[str, Callable[[], R]]) -> Callable[[], R]:
    """The recipe of that name in `RECIPES` or `TOKENIZER_RECIPES`.

    Raises:
        UserError: unknown; the nearest names are suggested.
    """
    if name not in recipes:
        raise unknown_name("tokenizer recipe" if recipes is TOKENIZER_RECIPES else "recipe", name, recipes)
    return recipes[name]
