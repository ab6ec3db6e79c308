"""Checks of plain settings: an error names the value, what is allowed, and the setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deliberate.utils.errors import DeliberateError


def at_least(name: str, value: Any, least: int) -> int:
    """`value`, if it is a whole number of at least `least`.

    Raises:
        DeliberateError: it is another number, or no number; a bool is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DeliberateError(f"{name}={value!r} must be a whole number of at least {least}")
    return value


def all_at_least(cfg: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """`at_least` for several settings of a configuration; a key may be dotted (``step.after``).

    Raises:
        DeliberateError: names the first value that is too small or no whole number.
    """
    for name, value in least.items():
        found: Any = cfg
        for key in name.split("."):
            if not isinstance(found, Mapping):
                above = name.rpartition(".")[0]
                raise DeliberateError(
                    f"{above}={found!r:.60} must be settings by name ({key}, ...)"
                )
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


def settings_given(what: str, kind: Any, given: Any) -> dict[str, Any]:
    """Settings that are given for a dataclass: names that it has, values of its defaults' kind.

    Args:
        what: whose settings they are, for errors.
        kind: the dataclass. A default that is a float wants a number, a tuple a list of words.
        given: a mapping, or None for none.

    Raises:
        DeliberateError: no mapping, an unknown name, or a value of another kind.
    """
    fields = {one.name: one.default for one in dataclasses.fields(kind)}
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise DeliberateError(
            f"{what}: {given!r:.60} is no mapping: give its settings by name ({', '.join(fields)})"
        )
    for key, value in given.items():
        if key not in fields:
            raise DeliberateError(f"{what} has no setting {key!r}; it has {', '.join(fields)}")
        default = fields[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, float) and not number:
            raise DeliberateError(f"{what}: {key}={value!r:.60} must be a number, e.g. {default}")
        if isinstance(default, tuple):
            word_list(f"{what}: {key}", value)
    return dict(given)


def word_list(name: str, value: Any, other: str = "") -> tuple[str, ...]:
    """`value`, if it is a list of texts that are not blank; the error names `other` values, too.

    Raises:
        DeliberateError: it is something else, a single text among them.
    """
    words = isinstance(value, Sequence) and not isinstance(value, str)
    words = words and all(isinstance(word, str) and word.strip() for word in value)
    if not words:
        raise DeliberateError(f"{name}={value!r:.60} must be a list of words{other}")
    return tuple(value)


def text_list(name: str, value: Any) -> tuple[str, ...]:
    """`value`, if it is a list of texts, none of them empty; a new line is one.

    Raises:
        DeliberateError: it is something else, a single text among them.
    """
    texts = isinstance(value, Sequence) and not isinstance(value, str)
    if not texts or not all(isinstance(text, str) and text for text in value):
        raise DeliberateError(f"{name}={value!r:.60} must be a list of texts")
    return tuple(value)
