"""Bands on a calibrated probability: answer, go on, or think again.

At the end of a line a probe is made to answer. The calibrated probability that its answer is the
whole chain's decides: from `answer` on the chain ends; from `go_on` on it goes on; below it the
chain is in doubt, and if it ends by itself while it is, its end is put off where the budget has
extensions (s1's "Wait", `BudgetSettings.extensions`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deliberate.reasoning.answer_probes import Same, same_text
from deliberate.reasoning.chain_calibration import ChainCalibration
from deliberate.reasoning.chain_walks import Streak
from deliberate.reasoning.confidence_bands import Band, Bands
from deliberate.reasoning.stop_policy import Action, Continue, Probe, Quiet, Stop, Trial
from deliberate.reasoning.trial_answers import ends_in, last_ids, trial_confidence
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class CalibratedBandsSettings:
    """The limits of the bands and where their calibration is.

    Attributes:
        calibration: a `ChainCalibration`, or the file or folder that holds one; None: the model's
            own, where there is a model (`generate`, `deliberate eval`).
        answer, go_on: limits of the bands.
        epsilon, delta: take the certified limit of these in place of `answer`; None: no guarantee.
        conditions: of this request, by the names of `deliberate.calibration.conditions`, with the
            hashes ``weights`` and ``exits``; compared with the certificate's. None with a
            guarantee: those that are known where there is a model; else refused.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    calibration: ChainCalibration | str | Path | None = None
    answer: float = 0.95
    go_on: float = 0.80
    epsilon: float | None = None
    delta: float | None = None
    conditions: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        Bands(self.answer, self.go_on)
        if (self.epsilon is None) != (self.delta is None):
            raise DeliberateError(
                f"epsilon={self.epsilon}, delta={self.delta}: give both for a guarantee, or none"
            )


@functools.lru_cache(maxsize=8)
def _loaded(path: str, changed: int) -> ChainCalibration:
    return ChainCalibration.load(path)


def load_calibration(given: ChainCalibration | str | Path) -> ChainCalibration:
    """A calibration, read anew only where its file has changed."""
    if isinstance(given, ChainCalibration):
        return given
    if not isinstance(given, (str, Path)):
        raise DeliberateError(f"bands calibration={given!r:.60}: give its file or folder")
    path = Path(given).expanduser()
    found = path.stat().st_mtime_ns if path.exists() else 0
    return _loaded(str(path), found)


class CalibratedBands:
    """The bands on one chain.

    Args:
        settings: limits and calibration.
        encode: ids of a text, without special tokens.
        same: whether two answers are equal.

    Attributes:
        doubtful: the newest answer is in the lowest band: the chain should not end by itself.
        probabilities: of the probes so far.

    Raises:
        DeliberateError: no calibration, a guarantee without conditions, no such certificate, or
            one of other conditions.
    """

    def __init__(
        self,
        settings: CalibratedBandsSettings,
        encode: Callable[[str], Sequence[int]],
        same: Same = same_text,
    ) -> None:
        if settings.calibration is None:
            raise DeliberateError(
                "bands need calibration=: the file that `deliberate bench chains` wrote for this "
                "model"
            )
        self._calibration = load_calibration(settings.calibration)
        answer = settings.answer
        if settings.epsilon is not None:
            answer = self._certified(settings)
        self.bands = Bands(answer, min(settings.go_on, answer))
        self._ends = boundary_ids(self._calibration.places.boundaries, encode)
        self._streak = Streak(same)
        self._last = 0
        self.doubtful = False
        self.probabilities: list[float] = []

    def _certified(self, settings: CalibratedBandsSettings) -> float:
        found = self._calibration.certificate(settings.epsilon, settings.delta)
        if settings.conditions is None:
            raise DeliberateError(
                f"bands with epsilon={settings.epsilon} need conditions= of the request: the "
                "certificate holds under its own alone"
            )
        given = dict(settings.conditions)
        hashes = {name: given.pop(name, None) for name in ("weights", "exits")}
        found.check(**hashes, conditions=given, policy=self._calibration.sha256)
        return found.lambda_

    def due(self, tokens: Sequence[int]) -> bool:
        """At the end of a line, `chunk` tokens or more after the last probe."""
        if len(tokens) - self._last < self._calibration.places.chunk:
            return False
        return not self._ends or ends_in(tokens, self._ends)

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """For `chunk` tokens after the last probe, then until the end of a line."""
        count = max(0, self._calibration.places.chunk - 1 - (len(tokens) - self._last))
        return Quiet(count, last_ids(self._ends)) if self._ends else Quiet.for_tokens(count)

    def on_step(self, tokens: Sequence[int]) -> Action:
        """A probe."""
        self._last = len(tokens)
        return Probe(self._calibration.places.answer_tokens)

    def on_probe(self, trial: Trial) -> Action:
        """`Stop` in the highest band."""
        confidence = trial_confidence(trial.probabilities)
        found = self._calibration.probability(confidence, self._streak.add(trial.text))
        self.probabilities.append(found)
        band = self.bands.band(found)
        self.doubtful = band is Band.DELIBERATE
        if band is Band.ANSWER:
            return Stop(f"answer at probability {found:.3f}")
        return Continue()


def boundary_ids(
    boundaries: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> list[tuple[int, ...]]:
    """Ids of each boundary text, sorted, without empty ones."""
    return sorted({tuple(encode(text)) for text in boundaries} - {()})
