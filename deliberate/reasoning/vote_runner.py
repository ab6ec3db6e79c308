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


def spent_on(chain: ChainResult) -> int:
    """Tokens that were made for a chain: with its probes and those that were rolled back."""
    return len(chain.tokens) + chain.probe_tokens + chain.rolled_back


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
        return sum(map(spent_on, self.chains))


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
        max_tokens: of the whole group, probes and tokens that are rolled back included. The first
            chains get their whole budgets, or one of them what there is; the next ones are begun
            where there is room for chains as long as those before. None: no such limit.

    Raises:
        DeliberateError: `max_tokens` is too few for one chain.
    """
    if max_tokens is not None:
        at_least("max_tokens", max_tokens, 1)
    result = VoteResult(tally([], same))
    ballots: list[Ballot] = []
    while wanted := rule.wanted(ballots, same):
        begin = len(ballots)
        if max_tokens is not None:  # a chain takes a token at least: no requests beyond that
            wanted = min(wanted, max(1, max_tokens - result.tokens))
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
            longest = max(map(spent_on, result.chains), default=0)
            requests = _within(requests, left, least, longest)
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


def _within(
    requests: Sequence[ChainRequest], left: int, least: int, longest: int
) -> list[ChainRequest]:
    """The first of the requests that fit into so many tokens, their probes charged to them.

    Args:
        left: tokens.
        least: of the shortest chain.
        longest: of the group's longest chain so far; 0: there is none yet.
    """
    own = requests[0].budget.max_new_tokens
    if longest:
        # Others are about as long: twice that is room enough, and a last one may be cut.
        count = left // min(own, 2 * longest) or int(left >= longest)
    else:
        count = max(1, left // own)
    count = min(count, len(requests))
    share = min(own, left // count) if count else 0
    if share < least and longest:  # a first chain's own limit is too small: running it says so
        return []
    return [
        replace(one, budget=replace(one.budget, max_new_tokens=share), charged=True)
        for one in requests[:count]
    ]
