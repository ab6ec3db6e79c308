"""Latency budgets: what a user may ask of time, and whether a machine can give it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deliberate.utils.errors import DeliberateError

# Milliseconds per response of the named tiers; pass another table where these do not fit.
DEFAULT_TIERS: Mapping[str, float] = MappingProxyType({"L1": 50.0, "L2": 200.0, "L3": 1000.0})
# A budget within this factor of the least possible leaves nothing to steer with.
TIGHT = 1.1


@dataclass(frozen=True)
class LatencyBudget:
    """How long an answer may take: one of a mean per token and a deadline.

    Attributes:
        ms_per_token: mean milliseconds per token over the response, prompt pass included.
        deadline_ms: milliseconds from the call to the last token.

    Raises:
        DeliberateError: both, none, or a value that is not a positive finite number.
    """

    ms_per_token: float | None = None
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        if (self.ms_per_token is None) == (self.deadline_ms is None):
            given = "none" if self.ms_per_token is None else "both"
            raise DeliberateError(
                f"a latency budget is ms_per_token or deadline_ms, one of the two: {given} given"
            )
        for name in ("ms_per_token", "deadline_ms"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DeliberateError(f"{name} = {value!r} is not a number of milliseconds")
            if not (math.isfinite(value) and value > 0):
                raise DeliberateError(
                    f"{name} = {value} is impossible: give a positive number of milliseconds"
                )
            object.__setattr__(self, name, float(value))

    @classmethod
    def tier(cls, name: str, tiers: Mapping[str, float] = DEFAULT_TIERS) -> LatencyBudget:
        """The deadline of a named tier, e.g. ``"L1"``.

        Args:
            tiers: milliseconds per response, by name.

        Raises:
            DeliberateError: a name that the table lacks.
        """
        if name not in tiers:
            listed = ", ".join(f"{key} ({ms:g} ms)" for key, ms in tiers.items())
            raise DeliberateError(f"latency tier {name!r} is unknown; there is {listed}")
        return cls(deadline_ms=tiers[name])

    @property
    def per_token_seconds(self) -> float | None:
        """The mean per token in seconds, or None for a deadline."""
        return None if self.ms_per_token is None else self.ms_per_token / 1e3

    @property
    def deadline_seconds(self) -> float | None:
        """The deadline in seconds, or None for a mean per token."""
        return None if self.deadline_ms is None else self.deadline_ms / 1e3

    def allowed_seconds(self, tokens: float) -> float:
        """Seconds that a response of `tokens` tokens may take in all."""
        if self.deadline_ms is not None:
            return self.deadline_ms / 1e3
        assert self.ms_per_token is not None
        return self.ms_per_token / 1e3 * tokens

    def __str__(self) -> str:
        if self.deadline_ms is not None:
            return f"deadline of {self.deadline_ms:g} ms"
        return f"{self.ms_per_token:g} ms per token"


def as_budget(
    value: LatencyBudget | str | Mapping[str, float], tiers: Mapping[str, float] = DEFAULT_TIERS
) -> LatencyBudget:
    """A budget from what users write: itself, a tier's name, or ``{"ms_per_token": 2.5}``.

    Raises:
        DeliberateError: anything else.
    """
    if isinstance(value, LatencyBudget):
        return value
    if isinstance(value, str):
        return LatencyBudget.tier(value, tiers)
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"ms_per_token", "deadline_ms"})
        if unknown:
            raise DeliberateError(
                f"latency budget has no {unknown[0]!r}: give ms_per_token or deadline_ms"
            )
        return LatencyBudget(**value)
    raise DeliberateError(
        f"latency budget {value!r}: give LatencyBudget(ms_per_token=...), "
        f"LatencyBudget(deadline_ms=...) or a tier ({', '.join(tiers)})"
    )


@dataclass(frozen=True)
class Feasibility:
    """Whether a budget can be met, found before decoding.

    Attributes:
        feasible: the least possible time is within the budget.
        tight: feasible, but by less than 10 %.
        ample: full depth is within the budget too.
        least_ms_per_token: mean per token when every token takes the earliest exit, with the
            prompt's pass spread over the expected tokens.
        least_ms: the same for the whole response.
        message: one line that names the budget and what is possible.
    """

    feasible: bool
    tight: bool
    ample: bool
    least_ms_per_token: float
    least_ms: float
    message: str

    def require(self) -> None:
        """Raises DeliberateError with the message unless the budget is feasible."""
        if not self.feasible:
            raise DeliberateError(self.message)


def feasibility(
    budget: LatencyBudget,
    *,
    least_seconds_per_token: float,
    dense_seconds_per_token: float,
    expected_tokens: float,
    prompt_seconds: float = 0.0,
) -> Feasibility:
    """Compares a budget with the least and the most that decoding takes.

    Args:
        least_seconds_per_token: of the fastest policy, in seconds.
        dense_seconds_per_token: of full depth, in seconds.
        expected_tokens: tokens of the response, at least 1.
        prompt_seconds: of the prompt's pass, which yields the first token.
    """
    for name, value in (
        ("least_seconds_per_token", least_seconds_per_token),
        ("dense_seconds_per_token", dense_seconds_per_token),
        ("prompt_seconds", prompt_seconds),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise DeliberateError(f"{name} = {value}: seconds must be finite and at least 0")
    if not (math.isfinite(expected_tokens) and expected_tokens >= 1):
        raise DeliberateError(f"expected_tokens = {expected_tokens} must be at least 1")
    steps = expected_tokens - 1  # the prompt's pass yields the first token
    least = prompt_seconds + steps * least_seconds_per_token
    dense = prompt_seconds + steps * dense_seconds_per_token
    allowed = budget.allowed_seconds(expected_tokens)
    feasible = least <= allowed
    least_each, dense_each = 1e3 * least / expected_tokens, 1e3 * dense / expected_tokens
    possible = (
        f"the least possible here is {least_each:.3g} ms per token "
        f"({1e3 * least:.3g} ms for the expected {expected_tokens:.0f} tokens)"
    )
    tight = feasible and least * TIGHT > allowed
    ample = dense <= allowed
    if not feasible:
        message = f"latency budget ({budget}) cannot be met: {possible}"
    elif tight:
        message = f"latency budget ({budget}) is within 10 % of what can be met: {possible}"
    elif ample:
        message = f"latency budget ({budget}) is met at full depth, {dense_each:.3g} ms per token"
    else:
        message = f"latency budget ({budget}) can be met: {possible}"
    return Feasibility(feasible, tight, ample, least_each, 1e3 * least, message)
