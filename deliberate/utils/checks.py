"""Checks of plain settings: an error names the value, what is allowed, and the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deliberate.utils.errors import DeliberateError


def at_least(name: str, value: Any, least: int) -> int:
    """`value`, if it is a whole number of at least `least`.

    Raises:
        DeliberateError: it is another number, or no number; a bool is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DeliberateError(f"{name}={value} must be a whole number of at least {least}")
    return value


def all_at_least(cfg: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """`at_least` for several settings of a configuration; a key may be dotted (``step.after``).

    Raises:
        DeliberateError: names the first value that is too small or no whole number.
    """
    for name, value in least.items():
        found: Any = cfg
        for key in name.split("."):
            found = found[key]
        at_least(name, found, value)


def one_of(name: str, value: Any, known: Any) -> Any:
    """`value`, if it is among the `known` ones.

    Raises:
        DeliberateError: it is not.
    """
    if value not in known:
        raise DeliberateError(f"{name}={value} is not one of {', '.join(map(str, known))}")
    return value
