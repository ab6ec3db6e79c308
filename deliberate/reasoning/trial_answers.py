"""Confidence of a trial answer: stop where the model is sure of the answer that it would give.

DEER (Yang et al., 2025, arXiv:2504.15895): where the chain turns to another line of reasoning (a
switch word such as "Wait"), a fork is made to answer; when the mean probability of the answer's
tokens, from the second one on, is above 0.95, the chain ends. At most 10 trials. An answer of one
token has the probability of that token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deliberate.reasoning.stop_policy import Action, Continue, Probe, Quiet, Stop, Trial
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError

SWITCHES = ("Wait", "Alternatively", "Hmm")


@dataclass(frozen=True)
class TrialAnswerSettings:
    """Constants of trial answers.

    Attributes:
        confidence: the chain ends above this mean probability, in (0, 1).
        trials: most trials in a chain.
        answer_tokens: most tokens of a trial answer.
        switches: words at which a trial is made, as they stand in the text.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    confidence: float = 0.95
    trials: int = 10
    answer_tokens: int = 20
    switches: tuple[str, ...] = SWITCHES

    def __post_init__(self) -> None:
        if not 0.0 < self.confidence < 1.0:
            raise DeliberateError(f"confidence={self.confidence} must be in (0, 1), e.g. 0.95")
        for name in ("trials", "answer_tokens"):
            at_least(name, getattr(self, name), 1)
        object.__setattr__(self, "switches", tuple(self.switches))
        if not self.switches or not all(isinstance(w, str) and w.strip() for w in self.switches):
            raise DeliberateError(f"switches={list(self.switches)}: give at least one word")


def word_tokens(
    words: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> set[tuple[int, ...]]:
    """Ids of each word as it stands at the start of a line and after a blank."""
    found = set()
    for word in words:
        for text in (word, f" {word}"):
            found.add(tuple(encode(text)))
    return found - {()}


def ends_in(tokens: Sequence[int], endings: Sequence[tuple[int, ...]]) -> bool:
    """Whether the last tokens are one of these runs."""
    return any(tuple(tokens[-len(run) :]) == run for run in endings)


def last_ids(runs: Sequence[tuple[int, ...]]) -> frozenset[int]:
    """The last token of each of these runs."""
    return frozenset(run[-1] for run in runs)


def trial_confidence(probabilities: Sequence[float]) -> float:
    """Mean probability from the second token on; of a single token its own; 0 for none."""
    counted = probabilities[1:] or probabilities
    return sum(counted) / len(counted) if counted else 0.0


class TrialAnswers:
    """The trials of one chain.

    Args:
        settings: the constants.
        encode: ids of a text, without special tokens.
    """

    def __init__(
        self, settings: TrialAnswerSettings, encode: Callable[[str], Sequence[int]]
    ) -> None:
        self.settings = settings
        self._switches = sorted(word_tokens(settings.switches, encode))
        self.confidences: list[float] = []
        self._tried = 0

    def due(self, tokens: Sequence[int]) -> bool:
        """At every switch word, until the trials are used up."""
        return self._tried < self.settings.trials and ends_in(tokens, self._switches)

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """Until a switch word."""
        used_up = self._tried >= self.settings.trials
        return Quiet(ends=frozenset() if used_up else last_ids(self._switches))

    def on_step(self, tokens: Sequence[int]) -> Action:
        """A trial; nothing at a first token, before which there is no reasoning to answer from."""
        if len(tokens) < 2:
            return Continue()
        self._tried += 1
        return Probe(self.settings.answer_tokens)

    def on_probe(self, trial: Trial) -> Action:
        """`Stop` where the answer is not empty and its confidence is above the limit."""
        self.confidences.append(trial_confidence(trial.probabilities))
        if trial.text.strip() and self.confidences[-1] > self.settings.confidence:
            return Stop(f"trial answer at {self.confidences[-1]:.3f}")
        return Continue()
