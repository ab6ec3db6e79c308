"""How far exits agree with the last layer, and the thresholds that hold a wanted agreement.

Pure figures over recordings: `deliberate.calibration.collect` makes these from a model. Tokens of
one text are
not independent, so every interval resamples whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from deliberate.calibration.exit_traces import Recording, replay
from deliberate.calibration.thresholds import NEVER, thresholds_in_turn
from deliberate.eval.statistics import Estimate, ratio_of_sums
from deliberate.utils.errors import DeliberateError

# Disagreement allowed among the tokens that exit early: from half of them down to one in 2,000.
_RATES = tuple(1.0 - float(doubt) for doubt in np.geomspace(0.5, 0.0005, 60))


@dataclass(frozen=True)
class ExitAgreement:
    """One exit on a recording.

    Attributes:
        layer: decoder layers below it.
        agreement: share of all tokens for which it would choose the last layer's, whether they
            come to it or not.
        threshold: least confidence at which a token exits; infinity where the exit is not
            evaluated.
        leaving: share of all tokens that exit here. A key of the file, as `kept` is.
        kept: share of those that are the last layer's; None where no token exits.
    """

    layer: int
    agreement: Estimate
    threshold: float
    leaving: float
    kept: Estimate | None


@dataclass(frozen=True)
class Agreement:
    """A recording under thresholds.

    Attributes:
        exits: in order of depth.
        reached: share of all tokens that are the last layer's.
        layers_per_token: layers below a token's exit, mean over tokens.
        tokens: how many tokens.
        sequences: of how many sequences.
    """

    exits: tuple[ExitAgreement, ...]
    reached: Estimate
    layers_per_token: float
    tokens: int
    sequences: int


def choose_thresholds(
    recording: Recording, target: float, exits: Sequence[bool] | None = None
) -> tuple[float, ...]:
    """Thresholds with the fewest layers per token at which `target` of all tokens agree.

    One rate of agreement is required of the tokens that exit early, the same at every exit; it is
    lowered as far as the agreement of all tokens, those at full depth included, allows.

    Args:
        recording: the tokens to choose on; figures are to be taken on others.
        target: in (0, 1].
        exits: which exits may be evaluated; all by default.

    Returns:
        One per exit, infinity where it is not evaluated or no threshold is high enough.
    """
    if not 0.0 < target <= 1.0:
        raise DeliberateError(f"target agreement {target} is outside (0, 1]")
    used = [True] * recording.num_exits if exits is None else list(exits)
    kept = [k for k, use in enumerate(used) if use]
    never = (math.inf,) * recording.num_exits
    if not kept or not len(recording):
        return never
    scores = [torch.as_tensor(recording.scores[:, k]) for k in kept]
    agrees = [torch.as_tensor(recording.agrees[:, k]) for k in kept]
    best, fewest = never, float(recording.num_layers)
    for rate in _RATES:
        row = list(never)
        for k, least in zip(kept, thresholds_in_turn(scores, agrees, rate), strict=True):
            row[k] = math.inf if least >= NEVER else least
        found = replay(recording, row)
        if found.risk <= 1.0 - target + 1e-12 and found.mean_layers < fewest:
            best, fewest = tuple(row), found.mean_layers
    return best


def agreement(recording: Recording, thresholds: Sequence[float], *, seed: int = 0) -> Agreement:
    """What a recording's tokens do under thresholds, with intervals over its sequences.

    Raises:
        DeliberateError: a recording without tokens.
    """
    if not len(recording):
        raise DeliberateError("the recording has no token: nothing was generated")
    found = replay(recording, thresholds)
    rows = []
    for k, layer in enumerate(recording.layers):
        left = found.exits == k
        kept = None
        if left.any():
            kept = share(recording.agrees[left, k], recording.sequence[left], seed=seed)
        rows.append(
            ExitAgreement(
                layer=layer,
                agreement=share(recording.agrees[:, k], recording.sequence, seed=seed),
                threshold=float(thresholds[k]),
                leaving=float(left.mean()),
                kept=kept,
            )
        )
    return Agreement(
        exits=tuple(rows),
        reached=share(found.agrees, recording.sequence, seed=seed),
        layers_per_token=found.mean_layers,
        tokens=len(recording),
        sequences=recording.num_sequences,
    )


def exit_rates(recording: Recording, thresholds: Sequence[float]) -> list[float]:
    """Share of the tokens evaluated at each exit that exit there; 0 where none is."""
    evaluated, rates = len(recording), []
    for left in replay(recording, thresholds).counts[:-1]:
        rates.append(left / evaluated if evaluated else 0.0)
        evaluated -= left
    return rates


def share(hits: ArrayLike, sequence: ArrayLike, *, seed: int = 0) -> Estimate:
    """Share of true values with a 95 % percentile bootstrap interval over sequences.

    Args:
        hits: bool ``[T]``, T at least 1.
        sequence: int ``[T]``, the sequence of each.
    """
    numbers = np.unique(np.asarray(sequence), return_inverse=True)[1]
    sums = np.bincount(numbers, weights=np.asarray(hits, dtype=np.float64))
    return ratio_of_sums(sums, np.bincount(numbers), seed=seed)
