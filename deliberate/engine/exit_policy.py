"""What sets the exits' thresholds while decoding: fixed ones, or a controller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from deliberate.utils.errors import DeliberateError


class Pacer(Protocol):
    """Asked by the decode loop before each step.

    Times are readings of one monotonic clock, in seconds, handed in by the caller: a pacer never
    reads a clock itself. One that has an attribute ``band`` also sets the `think_below` of the
    model's deliberation gate; None leaves it as it is.
    """

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """A response begins, before its prompt's pass."""
        ...

    def thresholds(self, now: float, tokens: int) -> Sequence[float]:
        """Least raw score to leave at each exit, ``[K]``; infinity means never.

        Args:
            tokens: tokens chosen so far; falls when drafts are taken back.
        """
        ...

    def end(self, now: float, tokens: int) -> None:
        """The response is complete with `tokens` tokens."""
        ...


class FixedPacer:
    """The same thresholds at every step: the executor may decode several tokens by them."""

    steady = True

    def __init__(self, thresholds: Sequence[float], band: float | None = None) -> None:
        """`thresholds`: one per exit; `band`: of the deliberation gate, None for its own."""
        self._thresholds = check_thresholds(thresholds)
        self.band = band

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """Nothing to prepare."""

    def thresholds(self, now: float, tokens: int) -> Sequence[float]:
        """The thresholds given at construction."""
        return self._thresholds

    def end(self, now: float, tokens: int) -> None:
        """Nothing to conclude."""


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """The thresholds as a tuple, if each is a number or infinity.

    Raises:
        DeliberateError: one of them is NaN.
    """
    values = tuple(float(threshold) for threshold in thresholds)
    if any(math.isnan(value) for value in values):
        raise DeliberateError(f"thresholds {list(values)} contain NaN: use infinity for never")
    return values
