"""The recipes by name: the modules of `train/objectives/`, and a user's own modules."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from deliberate.train import objectives
from deliberate.train.objectives.base import Recipe
from deliberate.utils.errors import DeliberateError

ATTRIBUTE = "RECIPE"
"""What a recipe's module calls its `Recipe`."""


def _built_in() -> dict[str, Recipe]:
    found = {}
    for module in pkgutil.iter_modules(objectives.__path__):
        loaded = importlib.import_module(f"{objectives.__name__}.{module.name}")
        if hasattr(loaded, ATTRIBUTE):
            found[module.name] = getattr(loaded, ATTRIBUTE)
    return found


RECIPES: Mapping[str, Recipe] = _built_in()
"""The recipes of this package; the name is that of the module."""


def find_recipe(name: object) -> Recipe:
    """The recipe that ``recipe.name`` says.

    Args:
        name: one of `RECIPES`, or the import path of a module (``package.module``) that has a
            `Recipe` under the name ``RECIPE``.

    Raises:
        DeliberateError: there is no such recipe, or the module cannot be imported.
    """
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    if not isinstance(name, str) or not all(map(str.isidentifier, name.split("."))):
        raise _unknown(name, "")
    if "." not in name:
        raise _unknown(name, "")
    try:
        recipe = getattr(importlib.import_module(name), ATTRIBUTE, None)
    except ImportError as error:
        raise _unknown(name, f" ({error})") from None
    if not isinstance(recipe, Recipe):
        raise _unknown(name, f" (it has no {ATTRIBUTE})")
    return recipe


def _unknown(name: object, reason: str) -> DeliberateError:
    return DeliberateError(
        f"recipe.name={name!r} is unknown{reason}; it is one of {', '.join(RECIPES)}, or an "
        f"importable module (package.module) with a {ATTRIBUTE}"
    )
