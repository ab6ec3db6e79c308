"""The usual early-exit rules, as families with one setting each, for comparison on recordings.

A rule says, for every token of a recording, with what probability it exits at each exit or at
full depth: 0 or 1 for all of them but the random one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deliberate.calibration.exit_traces import Recording, first_true
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.modeling.measures import ENTROPY

ExitProbabilities = NDArray[np.float64]
"""float64 ``[T, K + 1]``; every row sums to 1."""

PUBLISHED_LOW, PUBLISHED_HIGH = 0.85, 0.95
CALM_TEMPERATURE = 4.0

# 1 - threshold, from never (0) to always (1): even steps in the log of what is missing to 1.
_DOUBTS = (0.0, *np.geomspace(1e-6, 1.0, 121))


@dataclass(frozen=True)
class Rule:
    """A family of rules with one setting.

    Attributes:
        name: in tables.
        settings: values of its one setting.
        exit_probabilities: what the rule does to a recording at a setting.
    """

    name: str
    settings: tuple[float, ...]
    exit_probabilities: Callable[[Recording, float], ExitProbabilities]


def optimal_stopping(table: PolicyTable) -> Rule:
    """The policy table; the setting is the price."""
    return Rule(
        "optimal stopping",
        table.lambdas,
        lambda recording, lambda_: by_threshold(recording, np.asarray(table.thresholds(lambda_))),
    )


def usual_rules(recording: Recording) -> tuple[Rule, ...]:
    """Every comparison rule that the recording has the measures for."""
    exits = recording.num_exits
    measures = {recording.measure, *recording.others}
    rules = [
        Rule("constant threshold", _DOUBTS, _constant),
        Rule("rising with depth", _DOUBTS, _rising),
        Rule("decaying (CALM)", _DOUBTS, _decaying),
        Rule("patience", tuple(float(n) for n in range(1, exits + 2)), _patience),
        Rule("fixed depth", tuple(float(k) for k in range(exits + 1)), _fixed_depth),
        Rule("random exits", tuple(np.linspace(0.0, 1.0, 21)), _random),
    ]
    if ENTROPY.name in measures:
        rules.insert(3, Rule("entropy", _DOUBTS, _entropy))
    return tuple(rules)


def published_thresholds(exits: int) -> tuple[float, ...]:
    """0.85, 0.90, 0.95 for three exits; for other counts evenly from 0.85 to 0.95."""
    return tuple(float(t) for t in np.linspace(PUBLISHED_LOW, PUBLISHED_HIGH, exits))


def by_threshold(recording: Recording, thresholds: NDArray[np.float64]) -> ExitProbabilities:
    """Exits at the first exit that reaches its threshold: ``[K]``, or ``[T, K]`` by token."""
    return _one_hot(first_true(recording.scores >= thresholds), recording.num_exits)


def _one_hot(exits: NDArray[np.int64], top: int) -> ExitProbabilities:
    return np.eye(top + 1)[exits]


def _threshold(doubt: float) -> float:
    # a doubt of 0 is "never": a score may be 1 by rounding
    return np.inf if doubt == 0 else 1.0 - doubt


def _constant(recording: Recording, doubt: float) -> ExitProbabilities:
    return by_threshold(recording, np.full(recording.num_exits, _threshold(doubt)))


def _rising(recording: Recording, doubt: float) -> ExitProbabilities:
    """The published thresholds at doubt = 0.15 (0.85 / 0.90 / 0.95), their doubts in proportion."""
    if doubt == 0:
        return by_threshold(recording, np.full(recording.num_exits, np.inf))
    shape = 1.0 - np.asarray(published_thresholds(recording.num_exits))
    return by_threshold(recording, 1.0 - doubt * shape / shape[0])


def _decaying(recording: Recording, doubt: float) -> ExitProbabilities:
    """CALM (Schuster et al., NeurIPS 2022, eq. 5): stricter at first, then ever laxer.

    threshold(t) = 0.9 * level + 0.1 * exp(-4 t / N), within [0, 1]; N is the length of the longest
    answer.
    """
    if doubt == 0:
        return by_threshold(recording, np.full(recording.num_exits, np.inf))
    longest = int(recording.position.max(initial=0)) + 1
    decay = np.exp(-CALM_TEMPERATURE * recording.position / longest)
    level = np.clip(0.9 * (1.0 - doubt) + 0.1 * decay, 0.0, 1.0)
    return by_threshold(recording, np.repeat(level[:, None], recording.num_exits, axis=1))


def _entropy(recording: Recording, doubt: float) -> ExitProbabilities:
    return _constant(recording.with_measure(ENTROPY.name), doubt)


def _patience(recording: Recording, count: float) -> ExitProbabilities:
    """PABEE (Zhou et al., NeurIPS 2020): exit once `count` exits in a row choose one token."""
    run = np.ones(len(recording), dtype=np.int64)
    agreed = np.zeros(recording.tokens.shape, dtype=bool)
    for k in range(recording.num_exits):
        if k:
            same = recording.tokens[:, k] == recording.tokens[:, k - 1]
            run = np.where(same, run + 1, 1)
        agreed[:, k] = run >= count
    return _one_hot(first_true(agreed), recording.num_exits)


def _fixed_depth(recording: Recording, exit_index: float) -> ExitProbabilities:
    exits = np.full(len(recording), int(exit_index))
    return _one_hot(exits, recording.num_exits)


def _random(recording: Recording, rate: float) -> ExitProbabilities:
    """Exits at each exit it reaches with probability `rate`, whatever the token."""
    stays = (1.0 - rate) ** np.arange(recording.num_exits)
    shares = np.append(stays * rate, (1.0 - rate) ** recording.num_exits)
    return np.repeat(shares[None], len(recording), axis=0)
