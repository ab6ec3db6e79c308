"""One rate for depth, the length of a chain and the number of chains: expected gain per second.

Tables from recorded chains say, for the state that a rule sees, how many right answers a second of
going on is worth: along a chain by the calibrated probability of the newest probe and the equal
answers in a row, between chains (`deliberate.reasoning.rate_votes`) by how many there are and how
far the leading answer is ahead. A request accepts no less than its least rate, the inverse of
lambda (seconds per right answer). Probes are part of what going on costs. There are tables for each
depth at which chains were decoded (dense, exact, thresholds), with its own costs and chains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.chain_walks import Look, Walk
from deliberate.reasoning.recorded_chains import ChainCosts
from deliberate.utils.errors import DeliberateError

LookState = tuple[int, int]

HORIZONS = (1, 2, 4, 1 << 30)
_EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
_STREAKS = 3
# Fewer recorded states than this say too little.
_LEAST = 5


@dataclass(frozen=True)
class ProblemChains:
    """Recorded chains of one problem.

    Attributes:
        expected: the reference answer.
        walks: of each chain.
        answers: of each whole chain.
        costs: of each chain: a greedy one costs less than those that are sampled.

    Raises:
        DeliberateError: not one of each for every chain.
    """

    expected: str
    walks: tuple[Walk, ...]
    answers: tuple[str, ...]
    costs: tuple[ChainCosts, ...]

    def __post_init__(self) -> None:
        if not len(self.walks) == len(self.answers) == len(self.costs):
            raise DeliberateError(
                f"{len(self.walks)} walks, {len(self.answers)} answers and {len(self.costs)} costs "
                "of one problem: give one of each for every chain"
            )


@dataclass(frozen=True)
class RateTables:
    """What going on along a chain is worth, in right answers a second.

    Attributes:
        calibration: of the probes' answers.
        looks: by streak and bin of the calibrated probability.
    """

    calibration: ChainCalibration
    looks: Mapping[LookState, float]

    def look_rate(self, confidence: float, streak: int) -> float:
        """Of going on after a probe; infinity where too few chains were there."""
        state = look_state(self.calibration, confidence, streak)
        return self.looks.get(state, float("inf"))

    def stop(self, walk: Walk, least_rate: float) -> int | None:
        """The probe (from 0) at which a chain ends; None: it runs to its end."""
        for number, look in enumerate(walk.looks):
            if look.answer and self.look_rate(look.confidence, look.streak) < least_rate:
                return number
        return None


def look_state(calibration: ChainCalibration, confidence: float, streak: int) -> LookState:
    """The state of a probe."""
    probability = calibration.probability(confidence, streak)
    return min(streak, _STREAKS), int(np.searchsorted(_EDGES, probability, side="right"))


def look_cost(looks: Sequence[Look], costs: ChainCosts) -> float:
    """Seconds of probes."""
    return sum(costs.probe + costs.token * look.tokens for look in looks)


def walk_seconds(one: Walk, stop: int | None, costs: ChainCosts) -> float:
    """Seconds of a chain up to its probe `stop` (from 0), or to its end, probes included."""
    looks = one.looks if stop is None else one.looks[: stop + 1]
    tokens = one.tokens if stop is None else one.looks[stop].at
    fork = 0.0 if stop is None else costs.probe
    return costs.chain + costs.token * tokens + look_cost(looks, costs) + fork


def fit_tables(problems: Sequence[ProblemChains], calibration: ChainCalibration) -> RateTables:
    """Tables from chains with references.

    Raises:
        DeliberateError: no problems, or chains without references.
    """
    if not problems or any(one.right is None for p in problems for one in p.walks):
        raise DeliberateError("a least rate needs recorded chains with expected answers")
    looks: dict[tuple[LookState, int], list[tuple[float, float]]] = {}
    for walk, costs in (pair for problem in problems for pair in _costed(problem)):
        for place, look in enumerate(walk.looks):
            state = look_state(calibration, look.confidence, look.streak)
            for horizon in HORIZONS:
                later = place + horizon
                inside = later < len(walk.looks)
                right = walk.looks[later].right if inside else walk.right
                end = walk.looks[later].at if inside else walk.tokens
                between = walk.looks[place + 1 : later + 1]
                cost = costs.token * (end - look.at) + look_cost(between, costs)
                looks.setdefault((state, horizon), []).append(
                    (float(bool(right)) - float(bool(look.right)), cost)
                )
    return RateTables(calibration, best_rates(looks))


def _costed(problem: ProblemChains) -> Iterator[tuple[Walk, ChainCosts]]:
    return zip(problem.walks, problem.costs, strict=True)


def best_rates(found: Mapping[tuple[Any, int], Sequence[tuple[float, float]]]) -> dict[Any, float]:
    """The best rate of each state over the horizons, where there are enough records.

    Args:
        found: gains in right answers with their seconds, by state and horizon.
    """
    rates: dict[Any, float] = {}
    for (state, _), pairs in found.items():
        if len(pairs) >= _LEAST:
            gain, cost = np.asarray(pairs, dtype=np.float64).mean(axis=0)
            rate = float(gain / cost) if cost > 0 else 0.0
            rates[state] = max(rates.get(state, 0.0), rate)
    return rates


def rate_for(
    budget: float, least_rates: Sequence[float], seconds: Sequence[float], right: Sequence[float]
) -> float | None:
    """The least rate that was right most often within a budget of mean seconds; None: none fits."""
    fitting = [
        (r, -s, p) for p, s, r in zip(least_rates, seconds, right, strict=True) if s <= budget
    ]
    return max(fitting)[2] if fitting else None
