"""One rate for depth, the length of a chain and the number of chains: expected gain per second.

Tables from recorded chains say, for the state that a rule sees, how many right answers a second of
going on is worth: along a chain by the calibrated probability of the newest probe and the equal
answers in a row, between chains by how many there are and how far the leading answer is ahead. A
request accepts no less than its least rate, the inverse of lambda (seconds per right answer).
Probes are part of what going on costs. There are tables for each depth at which chains were decoded
(dense, exact, thresholds), with its own costs and chains: of a request at a least rate the depth is
the one with the most right answers less rate times seconds. A budget of seconds is turned into a
least rate by what each rate took on the chains of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deliberate.reasoning.answer_probes import Same
from deliberate.reasoning.calibrated_bands import boundary_ids
from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.chain_walks import Look, Streak, Walk
from deliberate.reasoning.recorded_chains import ChainCosts
from deliberate.reasoning.stop_policy import Action, Continue, Probe, Quiet, Stop, Trial
from deliberate.reasoning.trial_answers import ends_in, last_ids, trial_confidence
from deliberate.reasoning.votes import Ballot, tally
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError

LookState = tuple[int, int]
VoteState = tuple[int, int]

_EDGES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
_STREAKS, _MARGINS = 3, 8
_HORIZONS = (1, 2, 4, 1 << 30)
# Fewer recorded states than this say too little: the rule goes on.
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
    """What going on is worth, in right answers a second.

    Attributes:
        calibration: of the probes' answers.
        looks: by streak and bin of the calibrated probability.
        votes: by number of chains and lead.
        most: chains at most.
    """

    calibration: ChainCalibration
    looks: Mapping[LookState, float]
    votes: Mapping[VoteState, float]
    most: int

    def look_rate(self, confidence: float, streak: int) -> float:
        """Of going on after a probe; infinity where too few chains were there."""
        state = look_state(self.calibration, confidence, streak)
        return self.looks.get(state, float("inf"))

    def vote_rate(self, ballots: Sequence[Ballot], same: Same) -> float:
        """Of another chain; infinity where too few problems were there."""
        return self.votes.get(vote_state(ballots, same), float("inf"))


def look_state(calibration: ChainCalibration, confidence: float, streak: int) -> LookState:
    """The state of a probe."""
    probability = calibration.probability(confidence, streak)
    return min(streak, _STREAKS), int(np.searchsorted(_EDGES, probability, side="right"))


def vote_state(ballots: Sequence[Ballot], same: Same) -> VoteState:
    """The state of a vote: its chains, and by how many the leading answer is ahead."""
    first, second = (*tally(ballots, same).counts, 0, 0)[:2]
    return len(ballots), min(first - second, _MARGINS)


def look_cost(looks: Sequence[Look], costs: ChainCosts) -> float:
    """Seconds of probes."""
    return sum(costs.probe + costs.token * look.tokens for look in looks)


def walk_seconds(one: Walk, stop: int | None, costs: ChainCosts) -> float:
    """Seconds of a chain up to its probe `stop` (from 0), or to its end, probes included."""
    looks = one.looks if stop is None else one.looks[: stop + 1]
    tokens = one.tokens if stop is None else one.looks[stop].at
    fork = 0.0 if stop is None else costs.probe
    return costs.chain + costs.token * tokens + look_cost(looks, costs) + fork


def fit_tables(
    problems: Sequence[ProblemChains], calibration: ChainCalibration, same: Same
) -> RateTables:
    """Tables from chains with references, several of each problem for the votes.

    Raises:
        DeliberateError: no problems, or chains without references.
    """
    if not problems or any(one.right is None for p in problems for one in p.walks):
        raise DeliberateError("a least rate needs recorded chains with expected answers")
    looks: dict[tuple[LookState, int], list[tuple[float, float]]] = {}
    pairs = ((a, b) for problem in problems for a, b in _costed(problem))
    for walk, costs in pairs:
        for place, look in enumerate(walk.looks):
            state = look_state(calibration, look.confidence, look.streak)
            for horizon in _HORIZONS:
                later = place + horizon
                inside = later < len(walk.looks)
                right = walk.looks[later].right if inside else walk.right
                end = walk.looks[later].at if inside else walk.tokens
                between = walk.looks[place + 1 : later + 1]
                cost = costs.token * (end - look.at) + look_cost(between, costs)
                looks.setdefault((state, horizon), []).append(
                    (float(bool(right)) - float(bool(look.right)), cost)
                )
    most = max(len(problem.walks) for problem in problems)
    whole = [[walk_seconds(a, None, b) for a, b in _costed(problem)] for problem in problems]
    # What a further chain takes: the first one may be cheaper.
    further = [seconds for own in whole for seconds in own[1:]]
    chain = float(np.mean(further)) if further else 0.0
    votes: dict[tuple[VoteState, int], list[tuple[float, float]]] = {}
    for problem in problems:
        ballots = [Ballot(answer) for answer in problem.answers]
        rights = [_right(ballots[:n], problem, same) for n in range(len(ballots) + 1)]
        for n in range(1, len(ballots)):
            state = vote_state(ballots[:n], same)
            for horizon in _HORIZONS:
                later = min(n + horizon, len(ballots))
                gain = float(rights[later]) - float(rights[n])
                votes.setdefault((state, horizon), []).append((gain, chain * (later - n)))
    return RateTables(calibration, _rates(looks), _rates(votes), most)


def _costed(problem: ProblemChains) -> Iterator[tuple[Walk, ChainCosts]]:
    return zip(problem.walks, problem.costs, strict=True)


def _rates(found: Mapping[tuple[Any, int], Sequence[tuple[float, float]]]) -> dict[Any, float]:
    """The best rate of each state over the horizons, where there are enough records."""
    rates: dict[Any, float] = {}
    for (state, _), pairs in found.items():
        if len(pairs) >= _LEAST:
            gain, cost = np.asarray(pairs, dtype=np.float64).mean(axis=0)
            rate = float(gain / cost) if cost > 0 else 0.0
            rates[state] = max(rates.get(state, 0.0), rate)
    return rates


def _right(ballots: Sequence[Ballot], problem: ProblemChains, same: Same) -> bool:
    winner = tally(ballots, same).winner
    return bool(winner) and same(winner, problem.expected)


@dataclass(frozen=True)
class Spent:
    """One problem under a least rate: whether it was right, seconds, chains, reasoning tokens."""

    right: bool
    seconds: float
    chains: int
    tokens: int


def replay_rate(
    problem: ProblemChains,
    tables: RateTables,
    least_rate: float,
    same: Same,
    *,
    length: bool = True,
    chains: bool = True,
) -> Spent:
    """What a least rate would have spent on a recorded problem.

    Args:
        least_rate: least right answers a second for which the rule goes on.
        length, chains: which levels draw on it; a level that does not runs chains to their ends
            without probes, or one chain.
    """
    ballots: list[Ballot] = []
    seconds, tokens = 0.0, 0
    most = min(tables.most, len(problem.walks)) if chains else 1
    while len(ballots) < most:
        if ballots and tables.vote_rate(ballots, same) < least_rate:
            break
        number, stop = len(ballots), None
        walk, answer = problem.walks[number], problem.answers[number]
        costs = problem.costs[number]
        if length:
            rates = [tables.look_rate(look.confidence, look.streak) for look in walk.looks]
            places = (
                n for n, rate in enumerate(rates) if rate < least_rate and walk.looks[n].answer
            )
            stop = next(places, None)
            seconds += walk_seconds(walk, stop, costs)
        else:
            seconds += costs.chain + costs.token * walk.tokens
        tokens += walk.tokens if stop is None else walk.looks[stop].at
        ballots.append(Ballot(answer if stop is None else walk.looks[stop].answer))
    return Spent(_right(ballots, problem, same), seconds, len(ballots), tokens)


def replay_cut(problem: ProblemChains, size: int, same: Same) -> Spent:
    """One chain, cut at a length; the newest probe up to there answers."""
    one, answer, costs = problem.walks[0], problem.answers[0], problem.costs[0]
    if one.tokens <= size:
        right = bool(answer) and same(answer, problem.expected)
        return Spent(right, costs.chain + costs.token * one.tokens, 1, one.tokens)
    before = [look for look in one.looks if look.at <= size]
    seconds = costs.chain + costs.token * size + costs.probe
    return Spent(bool(before and before[-1].right), seconds, 1, size)


def replay_whole(problem: ProblemChains, count: int, same: Same) -> Spent:
    """A fixed number of whole chains, without probes."""
    own = list(_costed(problem))[:count]
    seconds = sum(costs.chain + costs.token * one.tokens for one, costs in own)
    right = _right([Ballot(answer) for answer in problem.answers[:count]], problem, same)
    return Spent(right, seconds, len(own), sum(one.tokens for one, _ in own))


def best_depth(least_rate: float, spent: Mapping[str, Sequence[Spent]]) -> str:
    """The depth that a least rate buys: with the most right answers less rate times seconds.

    Args:
        least_rate: right answers a second.
        spent: by depth, what the rate spent on the same problems there.
    """

    def worth(depth: str) -> tuple[float, float]:
        done = spent[depth]
        right = float(np.mean([one.right for one in done]))
        seconds = float(np.mean([one.seconds for one in done]))
        return right - least_rate * seconds, -seconds

    return max(spent, key=worth)


def rate_for(
    budget: float, least_rates: Sequence[float], seconds: Sequence[float], right: Sequence[float]
) -> float | None:
    """The least rate that was right most often within a budget of mean seconds; None: none fits."""
    fitting = [
        (r, -s, p) for p, s, r in zip(least_rates, seconds, right, strict=True) if s <= budget
    ]
    return max(fitting)[2] if fitting else None


class RatedChain:
    """A `StopPolicy`: the chain ends where going on is worth less than the least rate.

    Args:
        tables: of the model's chains.
        least_rate: right answers a second.
        encode: ids of a text.
        same: whether two answers are equal.
    """

    def __init__(
        self,
        tables: RateTables,
        least_rate: float,
        encode: Callable[[str], Sequence[int]],
        same: Same,
    ) -> None:
        if not least_rate >= 0.0:
            raise DeliberateError(
                f"least_rate={least_rate} must be 0 or more right answers a second"
            )
        self._tables, self._least = tables, least_rate
        self._places = tables.calibration.places
        self._ends = boundary_ids(self._places.boundaries, encode)
        self._streak = Streak(same)
        self._last = 0

    def due(self, tokens: Sequence[int]) -> bool:
        """At the ends of lines, as the tables were made."""
        if len(tokens) - self._last < self._places.chunk:
            return False
        return not self._ends or ends_in(tokens, self._ends)

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """For `chunk` tokens after the last probe, then until the end of a line."""
        count = max(0, self._places.chunk - 1 - (len(tokens) - self._last))
        return Quiet(count, last_ids(self._ends)) if self._ends else Quiet.for_tokens(count)

    def on_step(self, tokens: Sequence[int]) -> Action:
        """A probe."""
        self._last = len(tokens)
        return Probe(self._places.answer_tokens)

    def on_probe(self, trial: Trial) -> Action:
        """`Stop` where going on is worth too little."""
        streak = self._streak.add(trial.text)
        rate = self._tables.look_rate(trial_confidence(trial.probabilities), streak)
        if trial.text.strip() and rate < self._least:
            return Stop(f"going on is worth {rate:.3g} right answers a second")
        return Continue()


@dataclass(frozen=True)
class RatedVotes:
    """A `VoteRule`: another chain where it is worth the least rate.

    Attributes:
        tables: of the model's chains.
        least_rate: right answers a second.
        at_a_time: chains sampled together.
    """

    tables: RateTables
    least_rate: float
    at_a_time: int = 1

    def __post_init__(self) -> None:
        at_least("at_a_time", self.at_a_time, 1)

    @property
    def most(self) -> int:
        """Chains of a group at most."""
        return self.tables.most

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """`at_a_time` more while a chain is worth the least rate; the first one always."""
        if ballots and self.tables.vote_rate(ballots, same) < self.least_rate:
            return 0
        return min(self.at_a_time, self.most - len(ballots))
