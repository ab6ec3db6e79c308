"""Confidence bands along a chain of reasoning: answer, go on, or deliberate on the step.

The scale is the calibrated probability that a step agrees with full depth, so the bands mean the
same for every exit, measure and task. The rule decides; acting on it is the caller's part (a stop
policy of the engine, say).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from deliberate.utils.errors import DeliberateError


class Band(StrEnum):
    """What to do at a step of the chain."""

    ANSWER = "answer"
    GO_ON = "go_on"
    DELIBERATE = "deliberate"


@dataclass(frozen=True)
class Bands:
    """The limits of the bands.

    Attributes:
        answer: confident enough to answer from this probability on.
        go_on: from this one on the chain goes on; below it the step is deliberated on.

    Raises:
        DeliberateError: not ``0 < go_on <= answer <= 1``.
    """

    answer: float = 0.95
    go_on: float = 0.80

    def __post_init__(self) -> None:
        for name in ("answer", "go_on"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise DeliberateError(f"band {name} = {value} is outside (0, 1]")
        if self.go_on > self.answer:
            raise DeliberateError(
                f"band go_on = {self.go_on} is above answer = {self.answer}: use at most that"
            )

    def band(self, probability: float) -> Band:
        """The band of a calibrated probability in [0, 1]."""
        _check(probability)
        if probability >= self.answer:
            return Band.ANSWER
        return Band.GO_ON if probability >= self.go_on else Band.DELIBERATE


@dataclass(frozen=True)
class ChainStep:
    """One step of a chain, as `Deliberate` gets it.

    Attributes:
        index: of the step, from 0.
        probability: calibrated, that the step agrees with full depth.
        rounds: deliberation rounds so far.
    """

    index: int
    probability: float
    rounds: int = 0


@dataclass(frozen=True)
class StepDecision:
    """What to do after a step, at which probability, after how many deliberation rounds."""

    band: Band
    probability: float
    rounds: int


# Spends extra computation on a step and returns its probability after that.
Deliberate = Callable[[ChainStep], float]


@dataclass(frozen=True)
class ChainPolicy:
    """Decides after every step of a chain.

    Attributes:
        bands: their limits.
        deliberate: called for a step in the lowest band, again until the step is above it or
            the rounds are used up; None returns the step as it is.
        max_rounds: most calls for one step.
    """

    bands: Bands = Bands()
    deliberate: Deliberate | None = None
    max_rounds: int = 1

    def __post_init__(self) -> None:
        if self.max_rounds < 0:
            raise DeliberateError(f"max_rounds = {self.max_rounds} must be at least 0")

    def decide(self, index: int, probability: float) -> StepDecision:
        """The decision after step `index`, whose calibrated probability is given."""
        rounds = 0
        band = self.bands.band(probability)
        while band is Band.DELIBERATE and self.deliberate is not None and rounds < self.max_rounds:
            probability = self.deliberate(ChainStep(index, probability, rounds))
            rounds += 1
            band = self.bands.band(probability)
        return StepDecision(band, probability, rounds)


def step_probability(probabilities: Iterable[float]) -> float:
    """Probability that every token of a step agrees with full depth: the product of theirs.

    Takes the tokens' disagreements as independent given their probabilities; 1 for no tokens.
    """
    logarithm = 0.0
    for probability in probabilities:
        _check(probability)
        if probability == 0.0:
            return 0.0
        logarithm += math.log(probability)
    return math.exp(logarithm)


def _check(probability: float) -> None:
    if not 0.0 <= probability <= 1.0:
        raise DeliberateError(f"probability {probability} is outside [0, 1]: calibrate it first")
