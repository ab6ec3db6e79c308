"""When deliberation rounds pay: the gate threshold for each lambda of the policy.

Lambda is that of `deliberate.calibration.stopping_policy`: the seconds that one avoided wrong token
is worth. The gate threshold is compared with the largest probability at full depth, as an exit's
threshold is with its score, so lambda sets both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deliberate.calibration.cuts import cuts
from deliberate.utils.errors import DeliberateError

# Fewer tokens with rounds do not show which of them the rounds help.
LEAST_UNCERTAIN_TOKENS = 100


@dataclass(frozen=True)
class GateRounds:
    """What the rounds of a gate did to T tokens of reference texts.

    Attributes:
        probability: float ``[T]``, the largest at full depth before any round.
        helped: int8 ``[T]``, right after the rounds less right before them: 1, 0 or -1; 0 also
            where no round was tried, for being above `tried`.
        rounds: that a token below the gate threshold takes, at most.
        tried: tokens with a probability from here on took no round: no threshold may lie above it.

    Raises:
        DeliberateError: arrays that do not match, or rounds below 1.
    """

    probability: NDArray[np.floating]
    helped: NDArray[np.integer]
    rounds: int = 1
    tried: float = math.inf

    def __post_init__(self) -> None:
        if self.probability.shape != self.helped.shape or self.probability.ndim != 1:
            raise DeliberateError(
                f"{self.probability.shape} probabilities for {self.helped.shape} outcomes: give "
                "one of each"
            )
        if self.rounds < 1:
            raise DeliberateError(f"rounds {self.rounds} of a gate must be at least 1")

    def __len__(self) -> int:
        return len(self.probability)

    @property
    def uncertain_tokens(self) -> int:
        """Number of tokens for which the effect of the rounds is known."""
        return int((self.probability < self.tried).sum())

    def gate_threshold(self, lambda_: float, round_seconds: float) -> float:
        """The `think_below` that is worth most at a lambda; see `best_gate_threshold`."""
        known = self.probability < self.tried
        return best_gate_threshold(
            self.probability[known],
            self.helped[known],
            round_seconds=self.rounds * round_seconds,
            lambda_=lambda_,
        )

    def rounds_per_token(self, gate_threshold: float) -> float:
        """Most rounds that tokens like these take below a gate threshold, per token."""
        return self.rounds * float((self.probability < gate_threshold).mean()) if len(self) else 0.0


def best_gate_threshold(
    probability: NDArray[np.floating],
    helped: NDArray[np.floating] | NDArray[np.integer],
    *,
    round_seconds: float,
    lambda_: float,
) -> float:
    """The `think_below` that is worth most at a lambda, 0 where no round pays.

    Args:
        probability: ``[T]`` of the top before any round, of recorded tokens.
        helped: ``[T]`` right after the rounds less right before them: 1, 0 or -1.
        round_seconds: what the rounds of one token cost.
        lambda_: seconds that one wrong token avoided is worth; infinity asks for the most right
            tokens, and among such thresholds for the fewest rounds.

    Raises:
        DeliberateError: arrays that do not match, or a negative lambda or cost.
    """
    if probability.shape != helped.shape or probability.ndim != 1:
        raise DeliberateError(
            f"{probability.shape} probabilities for {helped.shape} outcomes: give one of each"
        )
    if not (lambda_ >= 0 and round_seconds >= 0):
        raise DeliberateError(
            f"lambda {lambda_} and round_seconds {round_seconds} must be at least 0"
        )
    gain = helped.astype(np.float64)
    # Rounds are taken below the threshold: the least probabilities come first.
    possible = cuts(
        -probability.astype(np.float64),
        gain if math.isinf(lambda_) else lambda_ * gain - round_seconds,
    )
    if not len(gain) or possible.totals.max() <= 0:
        return 0.0
    return float(np.nextafter(-possible.scores[possible.totals.argmax()], np.inf))
