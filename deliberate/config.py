"""Choices of a generation that every room knows: fidelity and KV mode."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from deliberate.utils.errors import DeliberateError

E = TypeVar("E", bound=StrEnum)

MAX_CALL_STEPS = 8
"""Whole steps in one call of an executor: who streams or stops on a string waits for so many."""


# Label of a position that is no target, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


class Fidelity(StrEnum):
    """What a generation promises of its output (see docs/concepts.md)."""

    DENSE = "dense"
    EXACT = "exact"
    THRESHOLD = "threshold"
    CERTIFIED = "certified"
    BUDGET = "budget"


class KVMode(StrEnum):
    """What the layers that a token skipped get to see of it (see docs/concepts.md).

    ``defer``: they run later, in a pass over all that wait: the KV of every layer is its own.
    ``propagate``: keys and values computed from the state at the exit: lossy.
    ``skip``: nothing: they never attend to the token: lossy.
    """

    DEFER = "defer"
    PROPAGATE = "propagate"
    SKIP = "skip"


def member_of(kind: type[E], value: str, name: str) -> E:
    """The member of an enumeration with this value.

    Args:
        name: of the setting, for the error.

    Raises:
        DeliberateError: there is none; the line lists those that there are.
    """
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member) for member in kind)
        raise DeliberateError(f"{name} {value!r} is unknown; it is one of {choices}") from None


def as_fidelity(value: Fidelity | str) -> Fidelity:
    """The fidelity of this name, or a one-line error with the list."""
    return member_of(Fidelity, value, "fidelity")


def as_kv_mode(value: KVMode | str) -> KVMode:
    """The KV mode of this name, or a one-line error with the list."""
    return member_of(KVMode, value, "kv_mode")
