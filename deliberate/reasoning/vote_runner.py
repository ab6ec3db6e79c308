"""Votes as groups of chains: sampled until the rule has enough, under one budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from deliberate.reasoning.answer_probes import Same, same_text
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.votes import Ballot, Tally, VoteRule, WeighingRule, tally
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


@dataclass
class VoteResult:
    """A finished vote.

    Attributes:
        tally: of its answers.
        chains: in the order in which they were sampled.
        over_budget: the rule wanted more chains, and the group's budget had no room for them.
    """

    tally: Tally
    chains: list[ChainResult] = field(default_factory=list)
    over_budget: bool = False

    @property
    def answer(self) -> str:
        """The answer of the vote."""
        return self.tally.winner

    @property
    def tokens(self) -> int:
        """Tokens of all chains, with their probes and those that were rolled back."""
        return sum(len(one.tokens) + one.probe_tokens + one.rolled_back for one in self.chains)


def run_votes(
    runner: ChainRunner,
    chain: Callable[[int], ChainRequest],
    rule: VoteRule,
    *,
    answer_of: Callable[[ChainResult], str] = lambda result: result.answer,
    same: Same = same_text,
    max_tokens: int | None = None,
) -> VoteResult:
    """Samples chains until the rule has enough of them.

    Args:
        runner: runs the chains; those that a rule wants at once run together and share the
            prompt's keys and values.
        chain: the request of chain i, from 0: with a seed of its own, and a policy of its own.
        rule: how many are sampled.
        answer_of: the answer that a chain votes for; empty: none.
        same: whether two answers are equal, as a grader does.
        max_tokens: of the whole group, probes and tokens that are rolled back included. A chain is
            begun where what was made leaves room for its whole budget, of which its probes take
            their part; the first one gets a smaller budget if need be. None: no such limit.

    Raises:
        DeliberateError: `max_tokens` is too few for one chain.
    """
    if max_tokens is not None:
        at_least("max_tokens", max_tokens, 1)
    result = VoteResult(tally([], same))
    ballots: list[Ballot] = []
    while wanted := rule.wanted(ballots, same):
        begin = len(ballots)
        requests = [chain(number) for number in range(begin, begin + wanted)]
        if isinstance(rule, WeighingRule):
            watch = rule.watch(result.chains)
            requests = [replace(request, watch=watch) for request in requests]
        if max_tokens is not None:
            least = runner.least(requests[0].budget)
            if max_tokens < least:
                raise DeliberateError(
                    f"votes.tokens={max_tokens}: a chain takes at least {least}, its tags and its "
                    "answer: allow more"
                )
            left = max_tokens - result.tokens
            requests = _within(requests, left, first=not result.chains)
            if not requests:
                result.over_budget = True
                break
        done = runner.run(requests)
        result.chains += done
        weights = [1.0] * len(result.chains)
        if isinstance(rule, WeighingRule) and result.chains:
            weights = rule.weights(result.chains)
        ballots = [
            Ballot("" if one.killed else answer_of(one), weight)
            for one, weight in zip(result.chains, weights, strict=True)
        ]
    result.tally = tally(ballots, same)
    return result


def _within(requests: Sequence[ChainRequest], left: int, *, first: bool) -> list[ChainRequest]:
    """Those of the requests whose budgets fit into so many tokens, their probes charged to them.

    Args:
        first: one of them is to be run in any case, with what there is.
    """
    fitting: list[ChainRequest] = []
    for request in requests:
        budget = request.budget
        if first and not fitting:
            budget = replace(budget, max_new_tokens=min(left, budget.max_new_tokens))
        left -= budget.max_new_tokens
        if left < 0:
            break
        fitting.append(replace(request, budget=budget, charged=True))
    return fitting
