"""Votes: how many chains of a group are sampled, and which answer they give.

Adaptive consistency (Aggarwal et al., 2023, arXiv:2305.11860) stops when the most frequent answer
would stay ahead of the second: P(p > 1/2) for p drawn from Beta(a + 1, b + 1), a and b their
counts, is at least 0.95. Unanimous answers stop at 4. Early-stopping self-consistency (Li et al.,
2024, arXiv:2401.10480) samples in windows and stops after one whose answers are all equal. Neither
stops where the chains disagree so much that no answer will have most of them: `DecidedVotes` does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from deliberate.reasoning.answer_probes import Same, plain_answer, same_text
from deliberate.reasoning.chain_confidence import OWN, ConfidenceWatch, weakest_window
from deliberate.reasoning.chain_output import ProbeRecord
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class Ballot:
    """The answer of one chain.

    Attributes:
        answer: empty where the chain gave none; it then votes for nothing.
        weight: of its vote, above 0; a count weighs every chain 1.
    """

    answer: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0.0):
            raise DeliberateError(f"the weight {self.weight} of a vote must be above 0")


@dataclass(frozen=True)
class Tally:
    """Equal answers together.

    Attributes:
        answers: one of each group of equal answers, most votes first; of equals the earlier.
        counts: chains of each group.
        weights: their weights together.
    """

    answers: tuple[str, ...]
    counts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def winner(self) -> str:
        """The answer of the vote; empty where no chain gave one."""
        return self.answers[0] if self.answers else ""


def tally(ballots: Sequence[Ballot], same: Same = same_text) -> Tally:
    """Counts the votes; `same` tells whether two answers are equal, as a grader does."""
    groups: list[list[Ballot]] = []
    for ballot in ballots:
        if not plain_answer(ballot.answer):
            continue
        group = next((g for g in groups if same(g[0].answer, ballot.answer)), None)
        if group is None:
            groups.append([ballot])
        else:
            group.append(ballot)
    groups.sort(key=lambda group: -sum(ballot.weight for ballot in group))  # a stable sort
    return Tally(
        tuple(group[0].answer for group in groups),
        tuple(map(len, groups)),
        tuple(sum(ballot.weight for ballot in group) for group in groups),
    )


def lead_probability(first: int, second: int) -> float:
    """P(p > 1/2) for p drawn from Beta(first + 1, second + 1).

    For whole numbers it is that of at most `first` heads in ``first + second + 1`` fair tosses.
    """
    tosses = first + second + 1
    return sum(math.comb(tosses, heads) for heads in range(first + 1)) / 2**tosses


class VoteRule(Protocol):
    """How many chains a group samples.

    Attributes:
        most: chains of a group at most.
    """

    @property
    def most(self) -> int:
        """Chains of a group at most."""
        ...

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """How many more chains to sample, after those that have answered; 0 ends the vote."""
        ...


@dataclass(frozen=True)
class FixedVotes:
    """A fixed number of chains (self-consistency, Wang et al., 2022, arXiv:2203.11171)."""

    most: int = 16

    def __post_init__(self) -> None:
        at_least("most", self.most, 1)

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """All at once."""
        return self.most - len(ballots)


@dataclass(frozen=True)
class AdaptiveConsistency:
    """Stops when the leading answer would stay ahead.

    Attributes:
        probability: of that, from which on the vote ends, in (1/2, 1).
        most: chains at most.
        at_a_time: chains sampled together. The rule may overshoot by one less than so many.
    """

    probability: float = 0.95
    most: int = 40
    at_a_time: int = 1

    def __post_init__(self) -> None:
        at_least("most", self.most, 1)
        at_least("at_a_time", self.at_a_time, 1)
        if not 0.5 < self.probability < 1.0:
            raise DeliberateError(f"probability={self.probability} must be in (0.5, 1), e.g. 0.95")

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """`at_a_time` more, until the leading answer is ahead for sure enough."""
        counts = [*tally(ballots, same).counts, 0, 0]
        first, second = sorted(counts, reverse=True)[:2]
        if first and lead_probability(first, second) >= self.probability:
            return 0
        return min(self.at_a_time, self.most - len(ballots))


@dataclass(frozen=True)
class EarlyStopWindows:
    """Stops after a window whose answers are all equal (ESC).

    Attributes:
        window: chains in a window.
        most: chains at most.
    """

    window: int = 4
    most: int = 40

    def __post_init__(self) -> None:
        at_least("window", self.window, 2)
        at_least("most", self.most, self.window)

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """The rest of the present window, or the next one."""
        done = len(ballots)
        within = done % self.window
        if done and not within:
            last = ballots[-self.window :]
            if tally(last, same).counts == (self.window,):
                return 0
        return min(self.window - within, self.most - done)


class WatchedChain(Protocol):
    """What a vote that weighs reads of a finished chain."""

    killed: bool
    confidences: list[float]
    reasoning_tokens: int
    probes: list[ProbeRecord]
    stopped: str | None
    answer: str


@runtime_checkable
class WeighingRule(Protocol):
    """A vote rule that watches its chains and weighs their votes."""

    def watch(self, chains: Sequence[WatchedChain]) -> ConfidenceWatch | None:
        """How the next chains are watched, after those that are done; None: they are not."""
        ...

    def weights(self, chains: Sequence[WatchedChain]) -> list[float]:
        """Of each chain's vote."""
        ...


@dataclass(frozen=True)
class DecidedVotes:
    """Stops when the leading answer would stay ahead, or when none would get most of the chains.

    Both are read from Beta distributions: P(p > 1/2) of the leading answer against the second, as
    adaptive consistency does, and of the leading answer against all others. A vote also ends when
    the second cannot catch up any more. A vote weighs the probability of the chain's least likely
    token, so that a chain can win where no answer has most of them.

    Attributes:
        probability: that the leading answer stays ahead, from which on the vote ends, in (1/2, 1).
        hopeless: probability that the leading answer has most of the chains, up to which the vote
            ends; 0: it never does.
        most: chains at most.
        first: chains sampled together at first.
        at_a_time: chains sampled together after them.
        weigh: by the least likely token; False: every chain counts 1.
    """

    probability: float = 0.9
    hopeless: float = 0.33
    most: int = 16
    first: int = 3
    at_a_time: int = 5
    weigh: bool = True

    def __post_init__(self) -> None:
        for name in ("most", "first", "at_a_time"):
            at_least(name, getattr(self, name), 1)
        if not 0.5 < self.probability < 1.0:
            raise DeliberateError(f"probability={self.probability} must be in (0.5, 1), e.g. 0.95")
        if not 0.0 <= self.hopeless < 0.5:
            raise DeliberateError(f"hopeless={self.hopeless} must be in [0, 0.5), e.g. 0.33")

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """The first chains, then `at_a_time` more until the vote is decided or given up."""
        done = len(ballots)
        left = self.most - done
        if done < self.first:
            return min(self.first - done, left)
        first, second = sorted([*tally(ballots, same).counts, 0, 0], reverse=True)[:2]
        if first and lead_probability(first, second) >= self.probability:
            return 0
        if first - second > left or lead_probability(first, done - first) <= self.hopeless:
            return 0
        return min(self.at_a_time, left)

    def watch(self, chains: Sequence[WatchedChain]) -> ConfidenceWatch | None:
        """Of the log-probability of every token, where votes are weighed."""
        return ConfidenceWatch(OWN, 1) if self.weigh else None

    def weights(self, chains: Sequence[WatchedChain]) -> list[float]:
        """Of each chain's vote: the probability of its least likely token."""
        if not self.weigh:
            return [1.0] * len(chains)
        return [max(1e-6, math.exp(min(one.confidences, default=-math.inf))) for one in chains]


@dataclass(frozen=True)
class ConfidenceVotes:
    """Votes weighed by confidence; weak chains are ended early (DeepConf, arXiv:2508.15260).

    The first chains run to their ends. From then on a chain is ended once a window of its tokens is
    less confident than the weakest windows of `keep` of the first chains. The vote ends when the
    leading answer has `consensus` of all weight.

    Attributes:
        most: chains at most.
        warm_up: chains that run to their ends first.
        keep: share of the first chains that would not have been ended, in (0, 1].
        window: of the first chains' median length, in (0, 1].
        consensus: share of the weight, in (1/2, 1].
        top: candidates of a token that its confidence is taken of.
        at_a_time: chains sampled together after the first ones.
    """

    most: int = 16
    warm_up: int = 4
    keep: float = 0.9
    window: float = 0.125
    consensus: float = 0.95
    top: int = 20
    at_a_time: int = 4

    def __post_init__(self) -> None:
        at_least("warm_up", self.warm_up, 1)
        at_least("most", self.most, self.warm_up)
        at_least("top", self.top, 1)
        at_least("at_a_time", self.at_a_time, 1)
        for name in ("keep", "window"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise DeliberateError(f"{name}={getattr(self, name)} must be in (0, 1]")
        if not 0.5 < self.consensus <= 1.0:
            raise DeliberateError(f"consensus={self.consensus} must be in (0.5, 1], e.g. 0.95")

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """The first chains, then `at_a_time` more until one answer has enough of the weight."""
        done = len(ballots)
        if done < self.warm_up:
            return self.warm_up - done
        weights = tally(ballots, same).weights
        if weights and weights[0] >= self.consensus * sum(weights):
            return 0
        return min(self.at_a_time, self.most - done)

    def tokens(self, chains: Sequence[WatchedChain]) -> int:
        """Of a window: a share of the first chains' median length, at least 4."""
        first = chains[: self.warm_up]
        return max(4, round(self.window * statistics.median(one.reasoning_tokens for one in first)))

    def watch(self, chains: Sequence[WatchedChain]) -> ConfidenceWatch:
        """How the next chains are watched, after those that are done."""
        if len(chains) < self.warm_up:
            return ConfidenceWatch(self.top)
        window = self.tokens(chains)
        weakest = sorted(weakest_window(one.confidences, window) for one in chains[: self.warm_up])
        return ConfidenceWatch(self.top, window, weakest[int((1.0 - self.keep) * len(weakest))])

    def weights(self, chains: Sequence[WatchedChain]) -> list[float]:
        """Of each chain's vote: the confidence of its weakest window."""
        window = self.tokens(chains)
        return [max(1e-6, weakest_window(one.confidences, window)) for one in chains]


VOTE_RULES: dict[str, Callable[..., VoteRule]] = {
    "fixed": FixedVotes,
    "adaptive": AdaptiveConsistency,
    "windows": EarlyStopWindows,
    "confidence": ConfidenceVotes,
    "decided": DecidedVotes,
}
