"""Votes as groups of chains: sampled until the rule has enough, under one budget of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from deliberate.reasoning.answer_probes import Same, same_text
from deliberate.reasoning.chain_output import ChainResult
from deliberate.reasoning.chain_runner import ChainRunner
from deliberate.reasoning.running_chain import ChainRequest
from deliberate.reasoning.votes import Ballot, Tally, VoteRule, WeighingRule, tally
from deliberate.utils.checks import at_least


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
        """Tokens of all chains and their probes."""
        return sum(len(chain.tokens) + chain.probe_tokens for chain in self.chains)


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
        max_tokens: of the whole group. A chain is begun where what was made, probes included,
            leaves room for its whole budget; the first one always. None: no such limit.
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
            left = max_tokens - result.tokens
            fitting: list[ChainRequest] = []
            for request in requests:
                left -= request.budget.max_new_tokens
                if left >= 0 or not (result.chains or fitting):
                    fitting.append(request)
            result.over_budget = len(fitting) < len(requests)
            requests = fitting
        done = runner.run(requests)
        result.chains += done
        weights = [1.0] * len(result.chains)
        if isinstance(rule, WeighingRule) and result.chains:
            weights = rule.weights(result.chains)
        ballots = [
            Ballot("" if one.killed else answer_of(one), weight)
            for one, weight in zip(result.chains, weights, strict=True)
        ]
        if result.over_budget:
            break
    result.tally = tally(ballots, same)
    return result
