"""What the latency controller is given: settings, thresholds, a meter; and what it reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deliberate.utils.errors import DeliberateError


class LambdaTable(Protocol):
    """A family of policies by lambda."""

    @property
    def lambdas(self) -> Sequence[float]:
        """Rising; the last may be infinite (no token exits)."""
        ...

    def thresholds(self, lambda_: float) -> Sequence[float]:
        """Least confidence to exit at each exit, ``[K]``."""
        ...


class Meter(Protocol):
    """Running total of what the work done so far should take
    (`deliberate.cost.model.WorkMeter`)."""

    def seconds(self) -> float: ...


@dataclass(frozen=True)
class ControllerSettings:
    """How the controller reacts; the defaults suit answers of tens to hundreds of tokens.

    Attributes:
        headroom: share of the budget kept back for the noise of the last tokens, at first.
        misses: share of responses that may exceed a budget that could be met; the headroom is
            moved until it holds (adaptive conformal inference, arXiv:2106.00170).
        adapt: how far one response moves the headroom; 0 keeps it.
        speed_tokens: time constant of the machine's factor with a meter.
        blind_tokens: the same without one, where catch-up bursts must average out.
        mix_tokens: time constant of the text's factor.
        bound: each factor stays within ``[1 / bound, bound]``.
        stall: a step counts with at most so many times its modelled seconds, so that one stall is
            not taken for a slow machine; four times the last one while stalls go on.
        debt_tokens: a saving is remembered up to so many tokens' budget.
        horizon_tokens: debt is paid back over at most so many tokens where earlier answers do not
            say how many remain, and over a quarter of those that may at least.
        dense_headroom: share kept back at full depth, whose time does not depend on the text.
        spend: a saving raises the pace by at most this share of the budget.
        length_share: deadline: share of such answers that the length planned for covers.
        guard: the guard closes where the time left is below so many times the least needed.
    """

    headroom: float = 0.05
    misses: float = 0.03
    adapt: float = 0.02
    speed_tokens: float = 8.0
    blind_tokens: float = 16.0
    mix_tokens: float = 128.0
    bound: float = 8.0
    stall: float = 8.0
    debt_tokens: float = 64.0
    horizon_tokens: float = 96.0
    spend: float = 0.05
    dense_headroom: float = 0.01
    length_share: float = 0.85
    guard: float = 1.1

    def __post_init__(self) -> None:
        for name in ("headroom", "misses", "adapt", "spend", "length_share", "dense_headroom"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise DeliberateError(f"controller {name} = {value} is outside [0, 1)")
        for name in (
            "speed_tokens",
            "blind_tokens",
            "mix_tokens",
            "bound",
            "stall",
            "debt_tokens",
            "horizon_tokens",
            "guard",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 1.0):
                raise DeliberateError(f"controller {name} = {value} must be at least 1")


@dataclass(frozen=True)
class BudgetReport:
    """How a response stood to its budget.

    Attributes:
        budget: what was asked, in words.
        met: the response took no longer than allowed.
        seconds: it took.
        tokens: it had.
        allowed_ms: it might have taken.
        guarded: steps at which the hard guard held.
        lambda_: the last one taken; 0 under the guard.
        speed: the machine's factor against the cost model at the end; above 1 is slower.
    """

    budget: str
    met: bool
    seconds: float
    tokens: int
    allowed_ms: float
    guarded: int
    lambda_: float
    speed: float

    @property
    def ms_per_token(self) -> float:
        """Mean over the response, prompt pass included."""
        return 1e3 * self.seconds / max(1, self.tokens)
