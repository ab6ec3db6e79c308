"""Choices of a generation that every room knows: fidelity, KV mode, and which risk is bounded."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

from deliberate.utils.errors import DeliberateError

E = TypeVar("E", bound=StrEnum)

MAX_CALL_STEPS = 8
"""Most full-depth steps in one call of an executor: a stream gets its tokens after each call."""


# Storages of rounded weights that can draft for the model itself.
DRAFT_STORAGES = ("int4", "int8", "bf16")

# Label of a position that is no target, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


class Fidelity(StrEnum):
    """How close to the full-depth model's output a generation stays (see docs/concepts.md)."""

    DENSE = "dense"
    EXACT = "exact"
    THRESHOLD = "threshold"
    CERTIFIED = "certified"
    BUDGET = "budget"


class KVMode(StrEnum):
    """How the layers that a token skipped get its keys and values (see docs/concepts.md).

    ``defer``: they run later, in one pass over all pending tokens: keys and values are exact.
    ``propagate``: keys and values computed from the state at the exit: lossy.
    ``skip``: they get none and never attend to the token: lossy.
    """

    DEFER = "defer"
    PROPAGATE = "propagate"
    SKIP = "skip"


class KVStorage(StrEnum):
    """In which form keys and values are kept.

    NATIVE: in the model's dtype. INT8: 8 bits, with a scale for each head of each token.
    """

    NATIVE = "native"
    INT8 = "int8"


class Risk(StrEnum):
    """What a certificate bounds the expectation of, per problem.

    TOKEN: the share of an answer's tokens that differ from the full-depth token chosen after the
    same dense prefix. ACCURACY: 1 where dense is right and the policy wrong, else 0. Its mean is at
    least the loss of accuracy, since what the policy gains elsewhere is not credited.
    """

    TOKEN = "token"
    ACCURACY = "accuracy"


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


def as_kv_storage(value: KVStorage | str) -> KVStorage:
    """The storage of keys and values of this name, or a one-line error with the list."""
    return member_of(KVStorage, value, "kv_storage")


def as_risk(value: Risk | str) -> Risk:
    """The risk of this name, or a one-line error with the list."""
    return member_of(Risk, value, "risk")


def check_guarantee(epsilon: float, delta: float) -> None:
    """Raises unless both lie in (0, 1)."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        ordinary = isinstance(value, int | float) and not isinstance(value, bool)
        if not (ordinary and 0.0 < value < 1.0):
            raise DeliberateError(f"{name}={value} must lie in (0, 1), e.g. 0.01")


def as_drafts(value: Any) -> str | tuple[int, ...] | None:
    """What of the model itself drafts: a storage of its weights, or layers numbered from 1.

    Raises:
        DeliberateError: neither.
    """
    if value is None or (isinstance(value, str) and value in DRAFT_STORAGES):
        return value
    layers = tuple(value) if isinstance(value, list | tuple) else ()
    whole = all(type(one) is int and one >= 1 for one in layers)
    if not layers or not whole or list(layers) != sorted(set(layers)):
        raise DeliberateError(
            f"drafts={value!r:.60}: give {', '.join(map(repr, DRAFT_STORAGES))}, or layers "
            "numbered from 1, rising, e.g. [1, 2, 5]"
        )
    return layers
