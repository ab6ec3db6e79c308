"""The latency controller: from a budget and measured time to the exits' thresholds.

A policy table offers thresholds for rising lambdas (seconds per expected disagreement) and, for
each, the seconds per token that it is expected to take. Before each step the controller works out
the seconds per token that the rest of the budget allows, corrects the table's expectation by what
was measured, and takes the largest lambda that fits.

- Feed-forward: the table's expectations, from the cost model. A row that a more careful one
  undercuts is never taken, and full depth is taken wherever it fits: its time does not depend on
  the text, so neither the text's factor nor the whole headroom counts against it.
- Integral correction, in states that live on the logarithm of seconds, where the machine's factor
  and the text's factor add up. Because the table is monotone this moves log lambda, with a
  gain that its local slope sets: the loop is as fast where lambda matters little as where it
  matters much. `speed` is the machine's factor: measured seconds over the seconds the cost model
  gives for the very passes that were run, so catch-up bursts cancel; a median, so that it follows
  a slower machine in a few tokens and not a single slow step. `mix` is slower: the
  mean of what stalls add to the machine's time, times the text's factor, the work that was run over
  what the table expected at the lambdas taken.
- Debt: time overdrawn against a mean per token is the integral of its error. It is paid back over
  the tokens that probably remain.
- Anti-windup: all factors are bounded, a first stall counts as a few tokens' time, and debt that
  the remaining tokens cannot repay at all is dropped: the response misses its budget either way.
- Hard guard: where the time left is about what the fastest row needs on this machine and text, that
  is taken: every threshold 0, or full depth where no exit is faster.

Pure Python arithmetic; the clock is an argument.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from bisect import bisect_right
from collections.abc import Sequence

from deliberate.engine.exit_policy import check_thresholds
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller_settings import (
    BudgetReport,
    ControllerSettings,
    LambdaTable,
    Meter,
)
from deliberate.policies.lengths import LengthPredictor
from deliberate.policies.row_times import RowTimes
from deliberate.utils.errors import DeliberateError

MOST_HEADROOM = 0.3
# What a generation learns: numbers, and decaying sums.
_FACTORS = ("_speed", "_drag", "_text", "_stall")
_SUMS = ("_blind", "_stalled", "_worked")
# Least slack of a budget that steering could have met.
FEASIBLE_SLACK = 1.1


class BudgetController:
    """An `ExitPolicy` that holds a latency budget.

    A controller steers one response at a time; called `begin`, it forgets the one before. Responses
    that run at once have a copy each: `fork` at the beginning, `merge` at the end, so that what is
    learnt about the machine, the text and the lengths carries over and each report is of its own
    response.

        controller = BudgetController(budget, table, expected)
        controller.watch(WorkMeter(cost, work))   # optional, after `begin`: reacts faster
        ...                                       # the loop calls begin and thresholds
        report = controller.end(now, tokens)
    """

    def __init__(
        self,
        budget: LatencyBudget,
        table: LambdaTable,
        expected: Sequence[float],
        *,
        least: float | None = None,
        lengths: LengthPredictor | None = None,
        settings: ControllerSettings | None = None,
    ) -> None:
        """
        Args:
            budget: what to hold.
            table: thresholds by lambda.
            expected: seconds per token at each of the table's lambdas, in any order: a lambda that
                a larger one undercuts is not taken.
            least: seconds per token when every token takes the earliest exit; by default that of
                the fastest row.
            lengths: of earlier answers; empty by default.
            settings: how it reacts.

        Raises:
            DeliberateError: arrays that do not fit, lambdas that do not rise, times not positive.
        """
        lambdas = [float(lambda_) for lambda_ in table.lambdas]
        if len(expected) != len(lambdas) or not lambdas:
            raise DeliberateError(
                f"{len(expected)} expected times for {len(lambdas)} lambdas: give one per lambda"
            )
        if any(not a < b for a, b in itertools.pairwise(lambdas)) or not lambdas[0] >= 0:
            raise DeliberateError(f"lambdas must rise from 0 or more, got {lambdas[:4]}...")
        self.budget = budget
        self.settings = settings or ControllerSettings()
        self.lengths = LengthPredictor() if lengths is None else lengths
        self._lambdas = lambdas
        self._rows = [check_thresholds(table.thresholds(lambda_)) for lambda_ in lambdas]
        self._times = RowTimes.of(self._rows, expected, least)
        self._meter: Meter | None = None
        self._metered = 0.0
        # Logarithms of the machine's factor, of what its stalls add, and of the text's factor.
        self._speed = self._drag = self._text = 0.0
        self._log_bound = math.log(self.settings.bound)
        self._recent = (0.0, 0.0)  # the last two samples of the machine's log factor
        self._samples = 0
        mean = self._times.rising[len(lambdas) // 2]
        # Decaying sums behind the factors: measured and expected seconds.
        self._blind = [mean * self.settings.blind_tokens] * 2
        self._stall = self.settings.stall  # most times its work that a step counts for now
        self._stalled = [mean * self.settings.mix_tokens] * 2
        self._worked = [mean * self.settings.mix_tokens] * 2
        self._headroom = self.settings.headroom
        self._limit = 1
        self._began = self._last = 0.0
        self._tokens = 0
        self._debt = 0.0
        # Seconds measured and modelled since a token was last chosen.
        self._elapsed = self._work = 0.0
        self._index = 0
        # Modelled seconds per token of the last choice, and whether it was full depth.
        self._base, self._at_full_depth = self._times.expected[0], False
        self._guarded = 0
        self._guarding = False
        # Of copies: how many were merged, and the headroom, when this one was made.
        self._merged = 0
        self._headroom_before = self._headroom
        self._lock = threading.Lock()  # shared with all copies

    # -- copies for responses that run at once ---------------------------------------------------

    def fork(self) -> BudgetController:
        """A copy that starts from what is known; what it learns is its own until it is merged."""
        with self._lock:
            own = copy.copy(self)
            for name in _SUMS:
                setattr(own, name, list(getattr(self, name)))
            own._headroom_before = self._headroom
            return own

    def merge(self, own: BudgetController) -> None:
        """Takes over what a copy has learnt, after its `end`.

        If no other copy was merged since this one was made, its state is taken as it is: responses
        one after the other are steered as by a single controller. Else factors and sums become the
        mean of what is known and what the copy found, since both describe the same machine, and
        the copy's change of the headroom is added, since each response counts as met or missed.
        """
        with self._lock:
            alone = own._merged == self._merged
            for name in _FACTORS:
                known, found = getattr(self, name), getattr(own, name)
                setattr(self, name, found if alone else 0.5 * (known + found))
            for name in _SUMS:
                pairs = zip(getattr(self, name), getattr(own, name), strict=True)
                setattr(
                    self,
                    name,
                    [found if alone else 0.5 * (known + found) for known, found in pairs],
                )
            self._recent = own._recent
            moved = self._headroom + own._headroom - own._headroom_before
            self._headroom = own._headroom if alone else min(MOST_HEADROOM, max(0.0, moved))
            self._merged += 1

    # -- what is known -------------------------------------------------------------------------

    @property
    def speed(self) -> float:
        """The machine's factor: measured over modelled seconds."""
        return math.exp(self._speed)

    @property
    def mix(self) -> float:
        """The text's factor: seconds at the machine's usual speed over those the table expected.

        Stalls, which are no work, are included.
        """
        return math.exp(self._bounded(self._drag + self._text))

    @property
    def headroom(self) -> float:
        """Share of the budget that is kept back now."""
        return self._headroom

    @property
    def lambda_(self) -> float:
        """The lambda taken last, in seconds per expected disagreement; 0 under the guard."""
        return 0.0 if self._guarding else self._lambdas[self._index]

    @property
    def planned_seconds(self) -> float:
        """Seconds per token that the last choice should take on this machine and text."""
        return self._base * self.speed * self.mix

    @property
    def guarding(self) -> bool:
        """Whether the last choice was the hard guard's."""
        return self._guarding

    def expect(self, times: RowTimes) -> None:
        """What each lambda takes from the next choice on: other sequences share the passes."""
        self._times = times

    def expect_speed(self, factor: float) -> None:
        """Starts from what is known of the machine: measured over modelled seconds."""
        self._speed = self._bounded(math.log(factor))

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
        """Thresholds for the next step; see `ExitPolicy`."""
        self._learn(now, tokens)
        self._decide(now)
        times = self._times
        self._base = times.least if self._guarding else times.expected[self._index]
        self._at_full_depth = self._base == times.dense
        return times.guard_row if self._guarding else self._rows[self._index]

    def end(self, now: float, tokens: int) -> BudgetReport:
        """The response is complete with `tokens` tokens: remembers its length and reports."""
        if tokens >= 1:
            self.lengths.observe(tokens)
        seconds = max(0.0, now - self._began)
        allowed = self.budget.allowed_seconds(tokens)
        met = seconds <= allowed
        # A budget that nothing could have met says nothing about the headroom.
        hopeless = FEASIBLE_SLACK * self._times.least * self.speed * tokens > allowed
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
            lambda_=self.lambda_,
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
            debt = self._debt + elapsed - pace * (1.0 - self._headroom) * made
            self._debt = max(-pace * settings.debt_tokens, debt)
        if made <= 0:
            return
        measured, worked = self._elapsed, self._work
        self._elapsed = self._work = 0.0
        # The first interval is the prompt's: it says nothing about decoding.
        if before == 0 or not 0.0 < measured < math.inf:
            return
        planned = self._base * made
        if self._meter is None:
            ratio = _decayed_ratio(self._blind, measured, planned, made / settings.blind_tokens)
            self._speed = self._bounded(math.log(ratio))
        elif worked > 0.0:
            self._follow_speed(math.log(measured / worked), made)
            share = made / settings.mix_tokens
            even = measured / math.exp(self._speed) / worked
            # One stall is no habit: a later one may count for more.
            self._stall = max(settings.stall, self._stall * math.exp(-share))
            if even > settings.stall:
                even = min(even, self._stall)
                self._stall = 4.0 * even
            ratio = _decayed_ratio(self._stalled, even * worked, worked, share)
            self._drag = self._bounded(math.log(ratio))
            # Full depth and the guard's row say nothing of what a text does to the others.
            if not self._guarding and not self._at_full_depth:
                ratio = _decayed_ratio(self._worked, worked, planned, share)
                self._text = self._bounded(math.log(ratio))

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
        """Sets the guard and lambda for the next step."""
        settings = self.settings
        tokens, limit = self._tokens, self._limit
        # What every row takes longer, and what the rows in between do.
        slow = math.exp(self._speed + max(0.0, self._drag))
        hard = self.mix * self.speed / slow
        pace = self.budget.per_token_seconds
        if pace is None:
            deadline = self.budget.deadline_seconds
            assert deadline is not None
            # The guard looks at the whole deadline, the plan keeps some of it back.
            remaining = float(self.lengths.quantile(tokens, limit, settings.length_share))
            left = deadline - (now - self._began)
            target, kept = left / remaining, deadline / remaining
        else:
            remaining = self.lengths.mean(tokens, limit)
            # From the debt, not the clock: what is lost beyond repair is dropped.
            debt = self._repayable(pace, slow, remaining)
            left = pace * (remaining + self._headroom * tokens) - debt
            saved = settings.spend * pace
            horizon = 1.0 if debt <= 0.0 else self._horizon()
            target, kept = pace + min(saved, -debt / horizon), pace
        times = self._times
        # What misses have added to the headroom is kept back from full depth too.
        spare = settings.dense_headroom + max(0.0, self._headroom - settings.headroom)
        if times.dense * slow <= target - spare * kept:
            self._guarding, self._index = False, len(self._rows) - 1
            return
        # The fastest row is taken to be slowed by the text as the others are.
        self._guarding = left <= settings.guard * times.least * slow * max(1.0, hard) * remaining
        if self._guarding:
            self._guarded += 1
            return
        allowed = (target - self._headroom * kept) / (slow * hard)
        self._index = max(times.fastest, bisect_right(times.rising, allowed) - 1)

    def _repayable(self, pace: float, slow: float, remaining: float) -> float:
        """The debt, or 0 where the fastest row could not repay it in the tokens that remain."""
        most = (pace - self._times.least * slow) * remaining + pace * self._headroom * self._tokens
        if self._debt > max(0.0, most):
            self._debt = 0.0
        return self._debt

    def _horizon(self) -> float:
        """Tokens over which debt is paid back."""
        tokens, limit, settings = self._tokens, self._limit, self.settings
        few = float(self.lengths.quantile(tokens, limit, 0.25))
        if not self.lengths.knows(tokens):
            few = min(few, max(settings.horizon_tokens, (limit - tokens) / 4.0))
        return max(8.0, few)


def _decayed_ratio(sums: list[float], measured: float, expected: float, share: float) -> float:
    """Adds to both decaying sums and returns measured over expected."""
    keep = math.exp(-share)
    sums[0] = keep * sums[0] + measured
    sums[1] = keep * sums[1] + expected
    return sums[0] / sums[1]
