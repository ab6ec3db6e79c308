"""Replays a stop policy on recorded chains: where it would have stopped, and at what cost.

The chain's tokens are those that were recorded, and a probe answers what it answered then, so
every rule decides on the same chains. A rule that forces tokens would change the chain: that cannot
be replayed, and is refused. Where a rule stops without a probe, the answer is that of the newest
probe up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deliberate.reasoning.answer_probes import Same, same_text
from deliberate.reasoning.recorded_chains import ChainCosts, RecordedChain, RecordedProbe
from deliberate.reasoning.stop_policy import (
    Force,
    Probe,
    Rollback,
    Stop,
    StopPolicy,
    Trial,
    quiet_after,
    watched_by,
)
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Replayed:
    """One chain under a policy.

    Attributes:
        answer: that it would have given.
        tokens: of reasoning.
        saved: tokens of reasoning that it would not have made.
        answer_tokens: of the answer, closing tag included.
        probes, probe_tokens: that the policy asked for.
        reason: why it stopped; None: the chain ended by itself.
        gave_up: it was stopped because it would not finish.
        moved: most tokens between a place where the policy looked and the probe that answered.
    """

    answer: str
    tokens: int
    saved: int
    answer_tokens: int
    probes: int = 0
    probe_tokens: int = 0
    reason: str | None = None
    gave_up: bool = False
    moved: int = 0

    @property
    def charged(self) -> int:
        """All tokens: reasoning, answer and probes."""
        return self.tokens + self.answer_tokens + self.probe_tokens

    def seconds(self, costs: ChainCosts) -> float:
        """Of decoding, by the costs; a stop takes one more probe, for the answer."""
        forks = self.probes + (self.reason is not None)
        return costs.chain + costs.token * self.charged + costs.probe * forks


def replay(policy: StopPolicy | None, chain: RecordedChain, *, exact: bool = True) -> Replayed:
    """What a policy, made for this chain, would have done on it.

    Args:
        policy: None: the chain as it is.
        chain: recorded.
        exact: a probe must have been recorded at every token where the policy asks for one;
            False: the newest one before it answers.

    Raises:
        DeliberateError: no such probe, or a policy that forces tokens.
    """
    if watched_by(policy) is not None:
        raise DeliberateError(
            "the policy 'variance' reads hidden states, which recorded chains lack: run it"
        )
    tokens, probes, spent, moved = chain.tokens, 0, 0, 0
    for made in _places(policy, tokens):
        assert policy is not None
        size = len(made)
        action = policy.on_step(made)
        if isinstance(action, Probe):
            probe = _probe(chain, size, exact)
            if probe is None:
                continue
            probes, spent, moved = probes + 1, spent + probe.tokens, max(moved, size - probe.at)
            # One probability stands for the mean of all: the policies read the mean.
            action = policy.on_probe(Trial(probe.answer, (), (probe.confidence,)))
        if isinstance(action, Force | Rollback):
            raise DeliberateError(
                "a policy that forces tokens or rolls some back changes the chain, so it cannot be "
                "replayed: run it"
            )
        if isinstance(action, Stop):
            last = _probe(chain, size, exact=False)
            answer = last or RecordedProbe(size, "")
            return Replayed(
                answer.answer,
                size,
                len(tokens) - size,
                answer.tokens,
                probes,
                spent,
                action.reason,
                action.gave_up,
                max(moved, size - answer.at),
            )
    return Replayed(chain.answer, len(tokens), 0, chain.answer_tokens, probes, spent, moved=moved)


def _places(policy: StopPolicy | None, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    """The tokens up to each place where the policy is due, in their order."""
    if policy is None:
        return
    # A policy that counts says for how long it is quiet; a chain may have 40,000 tokens.
    said = quiet_after(policy, ())
    counts = said is not None and said.count > 0
    size = 0
    while size < len(tokens):
        quiet = quiet_after(policy, tokens[:size]) if counts else None
        size += 1 + (0 if quiet is None else quiet.count)
        if size <= len(tokens) and policy.due(tokens[:size]):
            yield tokens[:size]


def _probe(chain: RecordedChain, place: int, exact: bool) -> RecordedProbe | None:
    found = chain.probe_at(place, exact=exact)
    if found is None and exact and place < len(chain.tokens):
        raise DeliberateError(
            f"chain {chain.id!r} has no probe after token {place}: record chains with probes "
            "there, or let the newest one before answer"
        )
    return found


@dataclass(frozen=True)
class RuleOutcome:
    """One rule on all chains, against the whole chains.

    Attributes:
        name: of the rule.
        replayed: one a chain.
        right: whether the answer is the reference's; None without references.
        changed: whether it is another than the whole chain's.
    """

    name: str
    replayed: tuple[Replayed, ...]
    right: tuple[bool, ...] | None
    changed: tuple[bool, ...]

    @property
    def tokens_saved(self) -> float:
        """Share of the reasoning tokens that were not made."""
        whole = sum(one.tokens + one.saved for one in self.replayed)
        return sum(one.saved for one in self.replayed) / whole if whole else 0.0

    @property
    def probe_share(self) -> float:
        """Share of all tokens that the probes cost."""
        charged = sum(one.charged for one in self.replayed)
        return sum(one.probe_tokens for one in self.replayed) / charged if charged else 0.0

    def seconds(self, costs: ChainCosts) -> float:
        """Of all chains."""
        return sum(one.seconds(costs) for one in self.replayed)


def replay_rule(
    name: str,
    make: Callable[[], StopPolicy | None],
    chains: Sequence[RecordedChain],
    same: Same = same_text,
    *,
    exact: bool = True,
) -> RuleOutcome:
    """A rule on all chains, a new policy for each."""
    done = tuple(replay(make(), chain, exact=exact) for chain in chains)
    known = all(chain.expected is not None for chain in chains)
    return RuleOutcome(
        name,
        done,
        tuple(
            bool(one.answer) and same(one.answer, chain.expected or "")
            for one, chain in zip(done, chains, strict=True)
        )
        if known
        else None,
        tuple(
            one.answer != chain.answer and not same(one.answer, chain.answer)
            for one, chain in zip(done, chains, strict=True)
        ),
    )


def matched_length(chains: Sequence[RecordedChain], mean_tokens: float) -> int:
    """The fixed length at which chains have this many tokens of reasoning on average."""
    sizes = [len(chain.tokens) for chain in chains]
    low, high = 1, max(sizes)
    while low < high:
        middle = (low + high) // 2
        if sum(min(size, middle) for size in sizes) / len(sizes) < mean_tokens:
            low = middle + 1
        else:
            high = middle
    return low
