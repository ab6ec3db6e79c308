"""Checks of single settings; what does not fit is one line with the key, its value and the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deliberate.utils.errors import DeliberateError


def check_whole(cfg: DictConfig, key: str, *, least: int, most: int | None = None) -> None:
    """The setting is a whole number within the bounds."""
    value = OmegaConf.select(cfg, key)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"within {least}..{most}"
        raise DeliberateError(f"{key}={value} must be a whole number {limit}")


def check_number(
    cfg: DictConfig, key: str, wanted: str, fits: Callable[[float], bool], value: Any = None
) -> None:
    """The setting, or `value`, is a finite number that `fits`; `wanted` says which would."""
    value = OmegaConf.select(cfg, key) if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not fits(value):
        raise DeliberateError(f"{key}={value} must be a number {wanted}")


def check_choice(cfg: DictConfig, key: str, choices: Any) -> None:
    """The setting is one of `choices`."""
    value = OmegaConf.select(cfg, key)
    if value not in list(choices):
        names = ", ".join(str(choice).lower() for choice in choices)
        raise DeliberateError(f"{key}={value!r} is unknown; it is one of {names}")
