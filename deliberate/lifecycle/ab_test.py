"""A candidate against the version that it may replace, on the same traffic at the same time.

The control is a second engine of the live version that gets as large a share of the requests as
the candidate: what the load does to the one it does to the other, which a comparison with the live
engine and its larger share could not say. The n-th outcome of the one is compared with the n-th of
the other; under random assignment the pairs of an equal candidate favour neither. Every test may be
looked at after each pair (`deliberate.lifecycle.betting`):

- harm: the candidate fails too often, loses more than the tolerance in quality, or is in the median
  slower by more than the tolerance. Each at a third of alpha, so that together an equal candidate
  is rolled back for harm with probability alpha at most, ever;
- gain: quality and speed are no worse than the tolerances, and one of the two is better. All of the
  first at alpha, the last at half of it each: a candidate that is worse than a tolerance is
  promoted with probability alpha at most.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from deliberate.lifecycle.betting import BettingTest
from deliberate.utils.errors import DeliberateError

# Outcomes of one arm that wait for their counterparts; more mean that the other gets none.
_MOST_WAITING = 10_000


class Arm(StrEnum):
    """Who answered."""

    CONTROL = "control"
    CANDIDATE = "candidate"


class Decision(StrEnum):
    """What is to be done."""

    CONTINUE = "continue"
    PROMOTE = "promote"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class Verdict:
    """A decision and why."""

    decision: Decision
    reason: str = ""


@dataclass(frozen=True)
class ABSettings:
    """Limits of a comparison.

    Attributes:
        alpha: see the module.
        loss_tolerance: mean loss that the candidate may have above the control's, e.g. 0.01 for a
            point.
        time_tolerance: share by which its median time may be longer.
        error_limit: share of requests that may fail.
        most_pairs: after so many without a decision the candidate is rolled back as no gain.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    alpha: float = 0.05
    loss_tolerance: float = 0.01
    time_tolerance: float = 0.1
    error_limit: float = 0.01
    most_pairs: int = 5000

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "most_pairs":
                if value < 1:
                    raise DeliberateError(f"most_pairs {value} must be at least 1")
            elif not 0.0 < value < 1.0:
                raise DeliberateError(f"{one.name} {value} must lie in (0, 1)")


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        failed: it got an error that is not its client's.
        seconds_per_token: from its arrival to its end, over its tokens; None where it failed.
    """

    failed: bool
    seconds_per_token: float | None = None


class ABTest:
    """Counts outcomes of both arms until there is a verdict.

    Args:
        settings: limits.

    Attributes:
        pairs: compared in time.
        losses: pairs compared in quality.
    """

    def __init__(self, settings: ABSettings | None = None) -> None:
        self.settings = one = settings or ABSettings()
        tolerance = one.loss_tolerance
        self._tests = {
            "errors": BettingTest(one.error_limit),
            "loss above tolerance": BettingTest(tolerance, -1.0, 1.0),
            "slower than tolerance": BettingTest(0.5),
            "loss within tolerance": BettingTest(-tolerance, -1.0, 1.0),
            "loss below control": BettingTest(0.0, -1.0, 1.0),
            "time within tolerance": BettingTest(0.5),
            "faster than control": BettingTest(0.5),
        }
        self._times: dict[Arm, deque[float]] = {arm: deque() for arm in Arm}
        self._losses: dict[Arm, deque[float]] = {arm: deque() for arm in Arm}
        self._log_ratio = 0.0

    @property
    def pairs(self) -> int:
        """See the class."""
        return self._tests["faster than control"].count

    @property
    def losses(self) -> int:
        """See the class."""
        return self._tests["loss below control"].count

    def note(self, arm: Arm, outcome: Outcome) -> Verdict:
        """A request has ended."""
        if arm is Arm.CANDIDATE:
            self._tests["errors"].update(float(outcome.failed))
        if outcome.seconds_per_token is not None and outcome.seconds_per_token > 0:
            found = _paired(self._times, arm, math.log(outcome.seconds_per_token))
            if found is not None:
                ratio = found[1] - found[0]
                self._log_ratio += ratio
                allowed = math.log1p(self.settings.time_tolerance)
                self._tests["slower than tolerance"].update(float(ratio > allowed))
                self._tests["time within tolerance"].update(float(ratio < allowed))
                self._tests["faster than control"].update(_half(ratio))
        return self.verdict()

    def note_loss(self, arm: Arm, loss: float) -> Verdict:
        """The quality of an answer was judged: a loss in [0, 1]."""
        found = _paired(self._losses, arm, loss)
        if found is not None:
            more = found[1] - found[0]
            self._tests["loss above tolerance"].update(more)
            self._tests["loss within tolerance"].update(-more)
            self._tests["loss below control"].update(-more)
        return self.verdict()

    def verdict(self) -> Verdict:
        """What the outcomes so far say."""
        one, tests = self.settings, self._tests
        share = one.alpha / 3
        if tests["errors"].rejects(share):
            return Verdict(
                Decision.ROLL_BACK,
                f"{tests['errors'].mean:.1%} of {tests['errors'].count} requests failed, "
                f"{one.error_limit:.1%} may",
            )
        loss = tests["loss above tolerance"]
        if loss.rejects(share):
            return Verdict(
                Decision.ROLL_BACK,
                f"its loss is {100 * loss.mean:+.2f} points over {loss.count} pairs, "
                f"{100 * one.loss_tolerance:g} may be",
            )
        if tests["slower than tolerance"].rejects(share):
            return Verdict(
                Decision.ROLL_BACK,
                f"it takes {self.time_ratio - 1:+.1%} time a token over {self.pairs} pairs, "
                f"{one.time_tolerance:.0%} more may be",
            )
        safe = (tests[f"{name} within tolerance"].rejects(one.alpha) for name in ("loss", "time"))
        if all(safe):
            if tests["faster than control"].rejects(one.alpha / 2):
                reason = f"it takes {self.time_ratio - 1:+.1%} time a token over {self.pairs} pairs"
                return Verdict(Decision.PROMOTE, f"{reason}, at a loss of {100 * loss.mean:+.2f}")
            if tests["loss below control"].rejects(one.alpha / 2):
                reason = f"its loss is {100 * loss.mean:+.2f} points over {loss.count} pairs"
                return Verdict(Decision.PROMOTE, f"{reason}, time {self.time_ratio - 1:+.1%}")
        if self.pairs >= one.most_pairs:
            return Verdict(Decision.ROLL_BACK, f"no gain was shown in {self.pairs} pairs")
        return Verdict(Decision.CONTINUE)

    @property
    def time_ratio(self) -> float:
        """Geometric mean of the candidate's time over the control's; 1 before the first pair."""
        return math.exp(self._log_ratio / self.pairs) if self.pairs else 1.0

    def figures(self) -> dict[str, Any]:
        """What was measured, JSON-ready."""
        loss = self._tests["loss above tolerance"]
        return {
            "requests": self._tests["errors"].count,
            "failed": round(self._tests["errors"].mean * self._tests["errors"].count)
            if self._tests["errors"].count
            else 0,
            "pairs": self.pairs,
            "time_ratio": round(self.time_ratio, 4),
            "judged_pairs": loss.count,
            "more_loss": round(loss.mean, 6) if loss.count else None,
            "evidence": {name: round(one.peak, 3) for name, one in self._tests.items()},
        }

    def snapshot(self) -> dict[str, Any]:
        """All that the tests have seen, JSON-ready; outcomes without a counterpart are left out."""
        tests = {name: one.snapshot() for name, one in self._tests.items()}
        return {"tests": tests, "log_ratio": self._log_ratio}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from the snapshot of a comparison with the same settings.

        Raises:
            DeliberateError: it is none.
        """
        try:
            for name, one in self._tests.items():
                one.restore(snapshot["tests"][name])
            self._log_ratio = float(snapshot["log_ratio"])
        except (KeyError, TypeError, ValueError):
            raise DeliberateError("this is no snapshot of a comparison") from None


def _paired(
    waiting: Mapping[Arm, deque[float]], arm: Arm, value: float
) -> tuple[float, float] | None:
    """(control, candidate) once both have a value, the oldest first."""
    waiting[arm].append(value)
    if len(waiting[arm]) > _MOST_WAITING:
        waiting[arm].popleft()
    if all(waiting.values()):
        return waiting[Arm.CONTROL].popleft(), waiting[Arm.CANDIDATE].popleft()
    return None


def _half(ratio: float) -> float:
    """1 where the candidate was faster, 0 where slower; equal times favour neither."""
    return 0.5 if ratio == 0 else float(ratio < 0)
