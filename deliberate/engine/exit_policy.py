"""Exit policies: what sets the exits' thresholds while decoding.

The decode loop knows the protocol and the constant policy; certified policies and the controller of
a latency budget are in `deliberate.policies`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from deliberate.utils.errors import DeliberateError


class ExitPolicy(Protocol):
    """Sets the exits' thresholds; the decode loop calls it before each step.

    Times are readings of one monotonic clock, in seconds, passed in by the caller: a policy never
    reads a clock itself.

    Two attributes are optional. ``gate_threshold`` replaces `GateConfig.think_below` of the model's
    deliberation gate; None keeps the gate's own. ``constant`` is True where the thresholds never
    change during a response, so that the executor may decode several tokens in one call.
    """

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """A response begins, before its prompt's pass."""
        ...

    def thresholds(self, now: float, tokens: int) -> Sequence[float]:
        """Least raw confidence to exit early, one per exit, ``[K]``; infinity means never.

        Args:
            tokens: tokens chosen so far; falls when drafts are rolled back.
        """
        ...

    def end(self, now: float, tokens: int) -> None:
        """The response is complete with `tokens` tokens."""
        ...


class FixedPolicy:
    """The same thresholds at every step."""

    constant = True

    def __init__(self, thresholds: Sequence[float], gate_threshold: float | None = None) -> None:
        """`thresholds`: one per exit; `gate_threshold`: None for the deliberation gate's own."""
        self._thresholds = check_thresholds(thresholds)
        self.gate_threshold = gate_threshold

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
