"""From the answers of a budget sweep to its figures: shares, times, accuracies, dominance.

A baseline may choose between two of its settings by a coin before each request; its accuracy at a
given mean time is then the best that such a mixture reaches within that time. The settings are
chosen on the same requests that they are judged on, which favours the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deliberate.eval.benchmarks.budget_variants import Answer, Variant
from deliberate.eval.statistics import Interval, percentiles, wilson_interval

SLACK = 1.1
WANTED_SHARE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """One variant over all requests that it answered.

    Attributes:
        ms_per_token: mean over requests of each one's mean, prompt pass included.
        median, p90, p99: of the same over requests.
    """

    name: str
    kind: str
    requests: int
    correct: int
    accuracy: float
    interval: Interval
    ms_per_token: float
    median: float
    p90: float
    p99: float
    tokens_per_request: float


@dataclass(frozen=True)
class Against:
    """A budget's accuracy less that of a kind of baseline at no more time.

    Attributes:
        setting: the best setting, or mixture of two, of the baseline.
        accuracy, ms_per_token: of it.
        difference, interval: of accuracy; bootstrap over requests, 95 %.
    """

    setting: str
    accuracy: float
    ms_per_token: float
    difference: float
    interval: Interval


@dataclass(frozen=True)
class BudgetRow:
    """One budget.

    Attributes:
        ms: the budget, mean milliseconds per token.
        refused: requests refused before decoding, with the least that was possible.
        within: answers within the budget.
        feasible: answers that the earliest exit would have given with 10 % to spare.
        feasible_within: of those, how many were within the budget; None where there are none.
        guarded: mean steps of an answer under the hard guard.
        speed: median of the machine's factor against the cost model.
        against: best fixed depth and random exits; None where they have nothing as fast.
    """

    ms: float
    point: Point
    refused: int
    within: int
    feasible: int
    feasible_within: int
    guarded: float
    speed: float
    against: Mapping[str, Against | None]

    @property
    def holds(self) -> bool | None:
        """Whether the wanted share of what was feasible was within; None without such requests."""
        return self.feasible_within >= WANTED_SHARE * self.feasible if self.feasible else None

    @property
    def dominates(self) -> bool:
        """No baseline at no more time is more accurate."""
        return all(found is None or found.difference >= 0 for found in self.against.values())


def point(variant: Variant, answers: Sequence[Answer], correct: Sequence[bool]) -> Point:
    """Figures of one variant on the requests that it answered, at least one."""
    times = [answer.ms_per_token for answer in answers]
    spread, right = percentiles(times), sum(correct)
    return Point(
        name=variant.name,
        kind=variant.kind,
        requests=len(answers),
        correct=right,
        accuracy=right / len(answers),
        interval=wilson_interval(right, len(answers)),
        ms_per_token=sum(times) / len(times),
        median=spread.median,
        p90=spread.p90,
        p99=spread.p99,
        tokens_per_request=sum(len(answer.tokens) for answer in answers) / len(answers),
    )


def budget_row(
    variant: Variant,
    answers: Sequence[Answer | None],
    correct: Sequence[bool],
    baselines: Mapping[Variant, tuple[Sequence[Answer], Sequence[bool]]],
    least_seconds: Callable[[int, int], float],
) -> BudgetRow | None:
    """A budget against the baselines on the requests it answered; None where it answered none.

    Args:
        answers, correct: one per request; None where refused.
        baselines: one answer per request each.
        least_seconds: request and tokens -> what the earliest exit takes for so many.
    """
    assert variant.budget is not None and variant.budget.ms_per_token is not None
    kept = [(i, answer) for i, answer in enumerate(answers) if answer is not None]
    if not kept:
        return None
    reports = [answer.report for _, answer in kept if answer.report is not None]
    within = feasible = feasible_within = 0
    for i, answer in kept:
        allowed = variant.budget.allowed_seconds(len(answer.tokens))
        met = answer.seconds <= allowed
        within += met
        if SLACK * least_seconds(i, len(answer.tokens)) <= allowed:
            feasible += 1
            feasible_within += met
    rows = [i for i, _ in kept]
    own = point(variant, [answer for _, answer in kept], [correct[i] for i in rows])
    right = np.asarray([correct[i] for i in rows], dtype=float)
    against = {}
    for kind in ("fixed", "random"):
        named = {
            other: (
                float(np.mean([found[i].ms_per_token for i in rows])),
                np.asarray([judged[i] for i in rows], dtype=float),
            )
            for other, (found, judged) in baselines.items()
            if other.kind == kind or other.kind == "dense"
        }
        against[kind] = _best_within(own.ms_per_token, right, named, mix=kind == "random")
    return BudgetRow(
        ms=variant.budget.ms_per_token,
        point=own,
        refused=len(answers) - len(kept),
        within=within,
        feasible=feasible,
        feasible_within=feasible_within,
        guarded=sum(report.guarded for report in reports) / len(reports),
        speed=median(report.speed for report in reports),
        against=against,
    )


def _best_within(
    ms: float,
    right: NDArray[np.float64],
    settings: Mapping[Variant, tuple[float, NDArray[np.float64]]],
    *,
    mix: bool,
) -> Against | None:
    """The most accurate setting, or mixture of two, whose mean time is at most `ms`."""
    options: list[tuple[str, float, NDArray[np.float64]]] = [
        (variant.name, time, judged) for variant, (time, judged) in settings.items() if time <= ms
    ]
    if mix:
        slow = [(variant, *found) for variant, found in settings.items() if found[0] > ms]
        for name, time, judged in list(options):
            for variant, longer, other in slow:
                share = (ms - time) / (longer - time)
                mixed = (1 - share) * judged + share * other
                options.append((f"{1 - share:.0%} {name}, {share:.0%} {variant.name}", ms, mixed))
    if not options:
        return None
    name, time, judged = max(options, key=lambda option: float(option[2].mean()))
    difference = right - judged
    return Against(
        setting=name,
        accuracy=float(judged.mean()),
        ms_per_token=time,
        difference=float(difference.mean()),
        interval=_mean_interval(difference),
    )


def _mean_interval(values: NDArray[np.float64]) -> Interval:
    """Percentile bootstrap of a mean over requests."""
    generator = np.random.default_rng(0)
    means = [
        float(values[generator.integers(0, len(values), len(values))].mean())
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(values.mean())
    return Interval(min(float(low), mean), max(float(high), mean))


def to_dict(value: Any) -> dict[str, Any]:
    """A point or row, JSON-ready; rows with their verdicts."""
    raw = asdict(value)
    if isinstance(value, BudgetRow):
        raw |= {"holds": value.holds, "dominates": value.dominates}
    return raw
