"""Recipes: one Python function per run, each returning a `Run`. `RECIPES` is the closed table of them.

A recipe's docstring holds its command, what it costs and what to expect. Any field can be overridden on the command line.
"""

from __future__ import annotations

from collections.abc import Callable

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
from continuar.training.config import BaseRun

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


def find_recipe(name: str) -> Callable[[], BaseRun]:
    """The recipe of that name.

    Raises:
        UserError: unknown; the nearest names are suggested.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]
