"""What another chain is worth under one rate, and how much the vote of a chain weighs.

How a chain came to its answer says how likely the answer is right: where no probe along it said
otherwise it nearly always is, where its end contradicts its last probes it seldom is. By that a
chain's vote weighs its log-odds (Nitzan and Paroush, 1982), and the state after some chains is how
far the weight of the leading answer is ahead of the second's. So a problem whose first chain never
wavered ends there, and its seconds are left to others. The tables are those of chains that end
where the same least rate ends them along the way: what another chain costs and what it is worth
depend on that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deliberate.reasoning.answer_probes import Same
from deliberate.reasoning.rates import (
    HORIZONS,
    ProblemChains,
    RateTables,
    best_rates,
    walk_seconds,
)
from deliberate.reasoning.votes import Ballot, tally

Sign = tuple[int, int, bool]
VoteState = tuple[int, int]

_CHANGES, _STREAKS = 2, 3
# Of a lead in log-odds.
_EDGES = (0.25, 1.0, 1.75, 2.5, 3.25, 4.0, 5.0, 6.0, 8.0)
# In place of a bin of the lead: all of them.
_ANY = -1
# A vote that weighs nothing would not be counted.
_LIGHTEST = 0.05


@dataclass(frozen=True)
class ChainRun:
    """A recorded chain as far as a least rate lets it run.

    Attributes:
        answer: of the chain, or of the probe that ended it.
        seconds: probes included.
        tokens: of reasoning.
        sign: how it came to its answer; None: without probes.
    """

    answer: str
    seconds: float
    tokens: int
    sign: Sign | None


@dataclass(frozen=True)
class VoteTables:
    """What another chain is worth, in right answers a second.

    Attributes:
        rates: by number of chains and bin of the lead, and over all leads.
        weights: of a chain's vote, by its sign.
        weight: of a chain of another sign.
        most: chains at most.
    """

    rates: Mapping[VoteState, float]
    weights: Mapping[Sign, float]
    weight: float
    most: int

    def weigh(self, sign: Sign | None) -> float:
        """The weight of a chain's vote."""
        return self.weight if sign is None else self.weights.get(sign, self.weight)

    def rate(self, ballots: Sequence[Ballot], same: Same) -> float:
        """Of another chain; where too few problems were in the state, after as many chains."""
        state = vote_state(ballots, same)
        pooled = self.rates.get((state[0], _ANY), float("inf"))
        return self.rates.get(state, pooled)


def chain_sign(answers: Sequence[str], final: str | None, same: Same) -> Sign:
    """How a chain came to its answer.

    Args:
        answers: of its probes, in order.
        final: of the whole chain; None: the newest probe has ended it.
        same: whether two answers are equal.

    Returns:
        How often the answer changed from probe to probe, how many of the newest probes gave the
        chain's, and whether it ran to its end.
    """
    changes = sum(not same(one, other) for one, other in itertools.pairwise(answers))
    last = final if final is not None else (answers[-1] if answers else "")
    equal = itertools.takewhile(lambda one: bool(one) and same(one, last), reversed(answers))
    return min(changes, _CHANGES), min(sum(1 for _ in equal), _STREAKS), final is not None


def vote_state(ballots: Sequence[Ballot], same: Same) -> VoteState:
    """The state of a vote: its chains, and by how much weight the leading answer is ahead."""
    first, second = (*tally(ballots, same).weights, 0.0, 0.0)[:2]
    return len(ballots), int(np.searchsorted(_EDGES, first - second, side="right"))


def run_of(
    problem: ProblemChains,
    number: int,
    tables: RateTables,
    least_rate: float,
    same: Same,
    *,
    length: bool,
) -> ChainRun:
    """Chain `number` of a problem under a least rate; without `length` whole and without probes."""
    walk, answer, costs = problem.walks[number], problem.answers[number], problem.costs[number]
    if not length:
        return ChainRun(answer, costs.chain + costs.token * walk.tokens, walk.tokens, None)
    stop = tables.stop(walk, least_rate)
    seconds = walk_seconds(walk, stop, costs)
    given = [look.answer for look in walk.looks]
    if stop is None:
        return ChainRun(answer, seconds, walk.tokens, chain_sign(given, answer, same))
    look = walk.looks[stop]
    return ChainRun(look.answer, seconds, look.at, chain_sign(given[: stop + 1], None, same))


def fit_votes(
    problems: Sequence[ProblemChains],
    tables: RateTables,
    least_rate: float,
    same: Same,
    *,
    length: bool = True,
) -> VoteTables:
    """Tables of a least rate from problems with several chains each.

    Args:
        length: chains end where the least rate ends them; else they run to their ends, unprobed.
    """
    runs = [
        [
            run_of(problem, number, tables, least_rate, same, length=length)
            for number in range(len(problem.walks))
        ]
        for problem in problems
    ]
    rights: dict[Sign | None, list[bool]] = {}
    for problem, own in zip(problems, runs, strict=True):
        for run in own:
            rights.setdefault(run.sign, []).append(_equal(run.answer, problem, same))
    every = [one for found in rights.values() for one in found]
    mean = float(np.mean(every))
    weights = {
        sign: _log_odds((sum(found) + 2 * mean) / (len(found) + 2))
        for sign, found in rights.items()
        if sign is not None
    }
    made = VoteTables({}, weights, _log_odds(mean), max(map(len, runs)))
    states: dict[tuple[VoteState, int], list[tuple[float, float]]] = {}
    for problem, own in zip(problems, runs, strict=True):
        for order in _orders(own):
            ballots = [Ballot(run.answer, made.weigh(run.sign)) for run in order]
            right = [is_right(ballots[:n], problem, same) for n in range(len(order) + 1)]
            for n in range(1, len(order)):
                state = vote_state(ballots[:n], same)
                for horizon in HORIZONS:
                    later = min(n + horizon, len(order))
                    gain = float(right[later]) - float(right[n])
                    cost = sum(run.seconds for run in order[n:later])
                    for one in (state, (n, _ANY)):
                        states.setdefault((one, horizon), []).append((gain, cost))
    return VoteTables(best_rates(states), weights, made.weight, made.most)


def _orders(runs: Sequence[ChainRun]) -> Iterator[Sequence[ChainRun]]:
    """The first chain, then the others from each of them on: they are samples alike."""
    later = runs[1:]
    for begin in range(max(1, len(later))):
        yield [*runs[:1], *later[begin:], *later[:begin]]


def is_right(ballots: Sequence[Ballot], problem: ProblemChains, same: Same) -> bool:
    """Whether the vote gives the reference answer."""
    return _equal(tally(ballots, same).winner, problem, same)


def _equal(answer: str, problem: ProblemChains, same: Same) -> bool:
    return bool(answer) and same(answer, problem.expected)


def _log_odds(probability: float) -> float:
    held = min(max(probability, 1e-6), 1.0 - 1e-6)
    return max(_LIGHTEST, math.log(held / (1.0 - held)))
