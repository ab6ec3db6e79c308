"""The latency controller: from a budget and measured time to the exits' thresholds.

A policy table offers thresholds for rising prices (seconds per expected disagreement) and, for
each, the seconds per token that it is expected to take. Before each step the controller works out
the seconds per token that the rest of the budget allows, corrects the table's expectation by what
was measured, and takes the dearest price that fits.

- Feed-forward: the table's expectations, from the cost model.
- Integral correction, in two states that live on the logarithm of seconds, where the machine's
  factor and the text's factor add up. Because the table is monotone this moves the log price, with
  a gain that its local slope sets: the loop is as fast where the price matters little as where it
  matters much. `speed` is the machine's factor: measured seconds over the seconds the cost model
  gives for the very passes that were run, so catch-up bursts cancel; a median, so that it follows
  a slower machine in a few tokens and not a single slow step. `mix` is the text's factor, slower: a
  mean of the seconds left when `speed` is divided out, stalls included, over what the table
  expected at the prices taken.
- Debt: time overdrawn against a mean per token is the integral of its error. It is paid back over
  the tokens that probably remain.
- Anti-windup: both factors and the debt are bounded, so a stretch that no price could have kept
  within the budget is not held against the future for ever.
- Hard guard: where the time left is about what the earliest exit needs, every threshold is 0.

Pure Python arithmetic; the clock is an argument.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deliberate.budget import LatencyBudget
from deliberate.errors import DeliberateError
from deliberate.lengths import LengthPredictor
from deliberate.pacing import check_thresholds

MOST_HEADROOM = 0.3
# Least slack of a budget that steering could have met.
FEASIBLE_SLACK = 1.1


class PriceTable(Protocol):
    """A family of policies by price."""

    @property
    def prices(self) -> Sequence[float]:
        """Rising; the last may be infinite (never leave)."""
        ...

    def thresholds(self, price: float) -> Sequence[float]:
        """Least score to leave at each exit, ``[K]``."""
        ...


class Meter(Protocol):
    """Running total of what the work done so far should take (`deliberate.cost.WorkMeter`)."""

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
        debt_tokens: the debt stays within so many tokens' budget.
        horizon_tokens: debt is paid back over at most so many tokens.
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
    debt_tokens: float = 64.0
    horizon_tokens: float = 96.0
    spend: float = 0.05
    length_share: float = 0.85
    guard: float = 1.1

    def __post_init__(self) -> None:
        for name in ("headroom", "misses", "adapt", "spend", "length_share"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise DeliberateError(f"controller {name} = {value} is outside [0, 1)")
        for name in (
            "speed_tokens",
            "blind_tokens",
            "mix_tokens",
            "bound",
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
        price: the last one taken; 0 under the guard.
        speed: the machine's factor against the cost model at the end; above 1 is slower.
    """

    budget: str
    met: bool
    seconds: float
    tokens: int
    allowed_ms: float
    guarded: int
    price: float
    speed: float

    @property
    def ms_per_token(self) -> float:
        """Mean over the response, prompt pass included."""
        return 1e3 * self.seconds / max(1, self.tokens)


class BudgetController:
    """A `Pacer` that holds a latency budget.

    One controller serves a stream of responses, one after the other: what it has learnt about the
    machine, the text and the lengths carries over. Call `end` after each.

        controller = BudgetController(budget, table, expected)
        controller.watch(WorkMeter(cost, work))   # optional, after `begin`: reacts faster
        ...                                       # the loop calls begin and thresholds
        report = controller.end(now, tokens)
    """

    def __init__(
        self,
        budget: LatencyBudget,
        table: PriceTable,
        expected: Sequence[float],
        *,
        least: float | None = None,
        lengths: LengthPredictor | None = None,
        settings: ControllerSettings | None = None,
    ) -> None:
        """
        Args:
            budget: what to hold.
            table: thresholds by price.
            expected: seconds per token at each of the table's prices; made rising where noise
                left it otherwise.
            least: seconds per token when every token takes the earliest exit; by default that of
                the lowest price.
            lengths: of earlier answers; empty by default.
            settings: how it reacts.

        Raises:
            DeliberateError: arrays that do not fit, prices that do not rise, times not positive.
        """
        prices = [float(price) for price in table.prices]
        if len(expected) != len(prices) or not prices:
            raise DeliberateError(
                f"{len(expected)} expected times for {len(prices)} prices: give one per price"
            )
        if any(not a < b for a, b in itertools.pairwise(prices)) or not prices[0] >= 0:
            raise DeliberateError(f"prices must rise from 0 or more, got {prices[:4]}...")
        for value in (*expected, *(() if least is None else (least,))):
            if not (math.isfinite(value) and value > 0):
                raise DeliberateError(f"expected time {value}: seconds per token must be positive")
        self.budget = budget
        self.settings = settings or ControllerSettings()
        self.lengths = LengthPredictor() if lengths is None else lengths
        self._prices = prices
        self._rows = [check_thresholds(table.thresholds(price)) for price in prices]
        rising: list[float] = []
        for value in expected:
            rising.append(max(float(value), rising[-1] if rising else 0.0))
        self._expected = rising
        self._least = rising[0] if least is None else min(float(least), rising[0])
        self._earliest = (0.0,) * len(self._rows[0])
        self._meter: Meter | None = None
        self._metered = 0.0
        # Logarithms of the machine's and the text's factor.
        self._speed = self._mix = 0.0
        self._log_bound = math.log(self.settings.bound)
        self._recent = (0.0, 0.0)  # the last two samples of the machine's log factor
        self._samples = 0
        mean = rising[len(rising) // 2]
        # Decaying sums behind the factors: measured and expected seconds.
        self._blind = [mean * self.settings.blind_tokens] * 2
        self._worked = [mean * self.settings.mix_tokens] * 2
        self._headroom = self.settings.headroom
        self._limit = 1
        self._began = self._last = 0.0
        self._tokens = 0
        self._debt = 0.0
        # Seconds measured and modelled since a token was last chosen.
        self._elapsed = self._work = 0.0
        self._index = 0
        self._guarded = 0
        self._guarding = False

    # -- what is known -------------------------------------------------------------------------

    @property
    def speed(self) -> float:
        """The machine's factor: measured over modelled seconds."""
        return math.exp(self._speed)

    @property
    def mix(self) -> float:
        """The text's factor: seconds at the machine's usual speed over those the table expected."""
        return math.exp(self._mix)

    @property
    def headroom(self) -> float:
        """Share of the budget that is kept back now."""
        return self._headroom

    @property
    def price(self) -> float:
        """The price taken last, in seconds per expected disagreement; 0 under the guard."""
        return 0.0 if self._guarding else self._prices[self._index]

    @property
    def planned_seconds(self) -> float:
        """Seconds per token that the last choice should take on this machine and text."""
        base = self._least if self._guarding else self._expected[self._index]
        return base * math.exp(self._speed + self._mix)

    @property
    def guarding(self) -> bool:
        """Whether the last choice was the hard guard's."""
        return self._guarding

    # -- life of a response --------------------------------------------------------------------

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """A response begins; forgets the debt and the meter of the one before."""
        self._began = self._last = now
        self._limit = max(1, max_new_tokens)
        self._tokens = 0
        self._debt = self._elapsed = self._work = 0.0
        self._guarded = 0
        self._guarding = False
        self._meter = None
        self._metered = 0.0
        self._samples = 0

    def watch(self, meter: Meter) -> None:
        """Compares measured time with what `meter` gives for the work done, from now on."""
        self._meter = meter
        self._metered = meter.seconds()
        self._samples = 0

    def thresholds(self, now: float, tokens: int) -> Sequence[float]:
        """Thresholds for the next step; see `Pacer`."""
        self._learn(now, tokens)
        self._decide(now)
        return self._earliest if self._guarding else self._rows[self._index]

    def end(self, now: float, tokens: int) -> BudgetReport:
        """The response is complete with `tokens` tokens: remembers its length and reports."""
        if tokens >= 1:
            self.lengths.observe(tokens)
        seconds = max(0.0, now - self._began)
        allowed = self.budget.allowed_seconds(tokens)
        met = seconds <= allowed
        # A budget that nothing could have met says nothing about the headroom.
        hopeless = FEASIBLE_SLACK * self._least * self.speed * tokens > allowed
        if met or not (hopeless or 2 * self._guarded > tokens):
            moved = self._headroom + self.settings.adapt * ((not met) - self.settings.misses)
            self._headroom = min(MOST_HEADROOM, max(0.0, moved))
        return BudgetReport(
            budget=str(self.budget),
            met=met,
            seconds=seconds,
            tokens=tokens,
            allowed_ms=1e3 * allowed,
            guarded=self._guarded,
            price=self.price,
            speed=self.speed,
        )

    # -- learning ------------------------------------------------------------------------------

    def _learn(self, now: float, tokens: int) -> None:
        """Takes in the time since the last call."""
        settings = self.settings
        elapsed, self._last = now - self._last, now
        made, before = tokens - self._tokens, self._tokens
        self._tokens = tokens
        self._elapsed += elapsed
        if self._meter is not None:
            total = self._meter.seconds()
            self._work, self._metered = self._work + total - self._metered, total
        pace = self.budget.per_token_seconds
        if pace is not None:
            bound = pace * settings.debt_tokens
            debt = self._debt + elapsed - pace * (1.0 - self._headroom) * made
            self._debt = min(bound, max(-bound, debt))
        if made <= 0:
            return
        measured, worked = self._elapsed, self._work
        self._elapsed = self._work = 0.0
        # The first interval is the prompt's: it says nothing about decoding.
        if before == 0 or not 0.0 < measured < math.inf:
            return
        planned = (self._least if self._guarding else self._expected[self._index]) * made
        if self._meter is None:
            ratio = _decayed_ratio(self._blind, measured, planned, made / settings.blind_tokens)
            self._speed = self._bounded(math.log(ratio))
        elif worked > 0.0:
            self._follow_speed(math.log(measured / worked), made)
            even = measured / math.exp(self._speed)
            ratio = _decayed_ratio(self._worked, even, planned, made / settings.mix_tokens)
            self._mix = self._bounded(math.log(ratio))

    def _follow_speed(self, sample: float, made: int) -> None:
        """Moves the machine's log factor towards the median of its last three samples."""
        older, old = self._recent
        self._recent = (old, sample)
        self._samples += 1
        if self._samples < 3:
            middle = sample if self._samples == 1 else 0.5 * (old + sample)
        else:
            # One slow step (another process had the core) is not a slower machine.
            middle = max(min(older, old), min(max(older, old), sample))
        gain = 1.0 - math.exp(-made / self.settings.speed_tokens)
        self._speed = self._bounded(self._speed + gain * (middle - self._speed))

    def _bounded(self, value: float) -> float:
        return min(self._log_bound, max(-self._log_bound, value))

    # -- deciding ------------------------------------------------------------------------------

    def _decide(self, now: float) -> None:
        """Sets the guard and the price for the next step."""
        settings = self.settings
        tokens, limit = self._tokens, self._limit
        spent = now - self._began
        slow = math.exp(self._speed)
        pace = self.budget.per_token_seconds
        if pace is None:
            deadline = self.budget.deadline_seconds
            assert deadline is not None
            # The guard looks at the whole deadline, the plan keeps some of it back.
            remaining = float(self.lengths.quantile(tokens, limit, settings.length_share))
            left = deadline - spent
            target = (left - self._headroom * deadline) / remaining
        else:
            remaining = self.lengths.mean(tokens, limit)
            # From the bounded debt, not the clock: what is lost beyond repair is let go.
            left = pace * (remaining + self._headroom * tokens) - self._debt
            saved = settings.spend * pace
            horizon = 1.0
            if self._debt > 0.0:
                horizon = min(
                    settings.horizon_tokens,
                    max(8.0, float(self.lengths.quantile(tokens, limit, 0.25))),
                )
            target = pace * (1.0 - self._headroom) + min(saved, -self._debt / horizon)
        needed = self._least * slow * remaining
        self._guarding = left <= settings.guard * needed
        if self._guarding:
            self._guarded += 1
            return
        allowed = target / (slow * math.exp(self._mix))
        self._index = max(0, bisect_right(self._expected, allowed) - 1)


def _decayed_ratio(sums: list[float], measured: float, expected: float, share: float) -> float:
    """Adds to both decaying sums and returns measured over expected."""
    keep = math.exp(-share)
    sums[0] = keep * sums[0] + measured
    sums[1] = keep * sums[1] + expected
    return sums[0] / sums[1]
