"""What a least rate, and fixed rules, would have spent on recorded chains."""

from __future__ import annotations

from dataclasses import dataclass

from deliberate.reasoning.answer_probes import Same
from deliberate.reasoning.rate_votes import VoteTables, is_right, run_of
from deliberate.reasoning.rates import ProblemChains, RateTables
from deliberate.reasoning.votes import Ballot


@dataclass(frozen=True)
class Spent:
    """One problem under a least rate: whether it was right, seconds, chains, reasoning tokens."""

    right: bool
    seconds: float
    chains: int
    tokens: int


NOTHING = Spent(False, 0.0, 0, 0)
"""Of a problem that is left unanswered."""


def replay_rate(
    problem: ProblemChains,
    tables: RateTables,
    least_rate: float,
    same: Same,
    *,
    votes: VoteTables | None = None,
    length: bool = True,
) -> Spent:
    """What a least rate would have spent on a recorded problem.

    Args:
        least_rate: least right answers a second for which the rule goes on.
        votes: what another chain is worth at that rate; None: one chain.
        length: chains end where the rate ends them; else they run to their ends without probes.
    """
    ballots: list[Ballot] = []
    seconds, tokens = 0.0, 0
    most = 1 if votes is None else min(votes.most, len(problem.walks))
    while len(ballots) < most:
        if ballots and votes is not None and votes.rate(ballots, same) < least_rate:
            break
        run = run_of(problem, len(ballots), tables, least_rate, same, length=length)
        seconds, tokens = seconds + run.seconds, tokens + run.tokens
        ballots.append(Ballot(run.answer, 1.0 if votes is None else votes.weigh(run.sign)))
    return Spent(is_right(ballots, problem, same), seconds, len(ballots), tokens)


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
    own = list(zip(problem.walks, problem.costs, strict=True))[:count]
    seconds = sum(costs.chain + costs.token * one.tokens for one, costs in own)
    right = is_right([Ballot(answer) for answer in problem.answers[:count]], problem, same)
    return Spent(right, seconds, len(own), sum(one.tokens for one, _ in own))
