"""One rate while decoding: where a chain ends, and whether another one is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deliberate.reasoning.answer_probes import Same
from deliberate.reasoning.calibrated_bands import boundary_ids
from deliberate.reasoning.chain_confidence import ConfidenceWatch
from deliberate.reasoning.chain_walks import Streak
from deliberate.reasoning.rate_votes import VoteTables, chain_sign
from deliberate.reasoning.rates import RateTables
from deliberate.reasoning.stop_policy import Action, Continue, Probe, Quiet, Stop, Trial
from deliberate.reasoning.trial_answers import ends_in, last_ids, trial_confidence
from deliberate.reasoning.votes import Ballot, WatchedChain
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


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
    """A `VoteRule`: another chain where it is worth the least rate; votes weigh by their signs.

    Attributes:
        tables: of the model's chains at that rate.
        least_rate: right answers a second.
        answer_of: the final answer in the text of an answer or probe; empty: none.
        same: whether two answers are equal.
        probed: chains are probed along the way, as those of the tables were.
        at_a_time: chains sampled together.
    """

    tables: VoteTables
    least_rate: float
    answer_of: Callable[[str], str]
    same: Same
    probed: bool = True
    at_a_time: int = 1

    def __post_init__(self) -> None:
        at_least("at_a_time", self.at_a_time, 1)

    @property
    def most(self) -> int:
        """Chains of a group at most."""
        return self.tables.most

    def wanted(self, ballots: Sequence[Ballot], same: Same) -> int:
        """`at_a_time` more while a chain is worth the least rate; the first one always."""
        if ballots and self.tables.rate(ballots, same) < self.least_rate:
            return 0
        return min(self.at_a_time, self.most - len(ballots))

    def watch(self, chains: Sequence[WatchedChain]) -> ConfidenceWatch | None:
        """No token's confidence is needed."""
        return None

    def weights(self, chains: Sequence[WatchedChain]) -> list[float]:
        """Of each chain's vote, by its probes."""
        return [self._weight(one) for one in chains]

    def _weight(self, chain: WatchedChain) -> float:
        if not self.probed:
            return self.tables.weigh(None)
        answers = [self.answer_of(probe.answer) for probe in chain.probes]
        final = None if chain.stopped is not None else self.answer_of(chain.answer)
        return self.tables.weigh(chain_sign(answers, final, self.same))
