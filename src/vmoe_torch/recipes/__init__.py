"""Recipes: one module per run worth repeating; its docstring says the command, the hardware, the cost, the result."""

import importlib
import pkgutil

from vmoe_torch.train.config import Config
from vmoe_torch.train.rules import near


def recipe_names() -> tuple[str, ...]:
    """The names that `load_recipe` takes."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_recipe(name: str) -> Config:
    """The configuration of a recipe.

    Raises:
        ValueError: if there is no such recipe.
    """
    if name not in recipe_names():
        hint = near(name, recipe_names(), most=2)
        raise ValueError(f"recipe must be one of {', '.join(recipe_names())}, got {name!r}{hint}")
    return importlib.import_module(f"{__name__}.{name}").config()
