"""When a small model's answer may take the place of a large one's: calibrated, and certified.

A cascade lets the small model answer, and hands over to the large one where the small one's
confidence is low (FrugalGPT, Chen et al., 2023, arXiv:2305.05176; Jitkrittum et al., NeurIPS 2023).
The confidence of a whole answer is turned into the probability that taking it loses nothing; from
which probability on it is taken is found by Learn then Test on other problems
(`deliberate.calibration.certificate`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.calibration.calibrator import Calibrator, fit_logistic
from deliberate.calibration.certificate import (
    Testing,
    accuracy_losses,
    binomial_p_value,
    fixed_sequence,
)
from deliberate.config import Risk, check_guarantee
from deliberate.utils.checks import one_of
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import OrInfinity, build_from, read_json

MEASURES = ("least", "mean")
"""Of an answer's token probabilities: the least, or their geometric mean."""

THRESHOLDS = (0.999, 0.998, 0.995, *(step / 100 for step in range(99, -1, -1)))
"""Probabilities from which the small answer is taken, the most careful first; fixed beforehand."""


def answer_confidence(logprobs: Sequence[float], measure: str) -> float:
    """Confidence of an answer in [0, 1] from the log-probabilities of its tokens.

    An answer without a token has none: 0.
    """
    one_of("measure", measure, MEASURES)
    if not len(logprobs):
        return 0.0
    value = min(logprobs) if measure == "least" else sum(logprobs) / len(logprobs)
    return math.exp(min(0.0, value))


@dataclass(frozen=True)
class CascadeRecord:
    """Both models' answers to some problems.

    Attributes:
        confidence: ``[P]`` of the small answers.
        small_right, large_right: ``[P]`` bool.
    """

    confidence: NDArray[np.float64]
    small_right: NDArray[np.bool_]
    large_right: NDArray[np.bool_]

    def __post_init__(self) -> None:
        object.__setattr__(self, "confidence", np.asarray(self.confidence, dtype=np.float64))
        for name in ("small_right", "large_right"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=bool))
        sizes = {len(self.confidence), len(self.small_right), len(self.large_right)}
        if len(sizes) > 1 or sizes == {0}:
            raise DeliberateError(f"a cascade's record has {sorted(sizes)} entries: one a problem")
        if not ((self.confidence >= 0) & (self.confidence <= 1)).all():
            raise DeliberateError("a cascade's confidences must lie in [0, 1]")

    def part(self, first: int, last: int) -> CascadeRecord:
        """Problems `first` to `last` - 1."""
        rows = slice(first, last)
        return CascadeRecord(self.confidence[rows], self.small_right[rows], self.large_right[rows])


@dataclass(frozen=True)
class CascadeCalibration:
    """From a small answer's confidence to whether it is taken.

    Attributes:
        measure: of `MEASURES`.
        calibrator: confidence -> probability that the small answer loses nothing: that it is right,
            or the large one is wrong too.
        threshold: least probability from which it is taken, certified; infinity: never.
        epsilon, delta: with probability at least 1 - delta over the draw of the testing problems,
            the large model is right and the cascade wrong for a share of at most epsilon.
        n, observed: testing problems, and that share among them.
        shares: share handed over at each of `THRESHOLDS`, among the fitting problems.
        small, large: SHA-256 of the base weights.
        max_new_tokens: limit of the answers.
        task: what the problems are.
        created: ISO time.
    """

    measure: str
    calibrator: Calibrator
    threshold: OrInfinity
    epsilon: float
    delta: float
    n: int
    observed: float
    shares: tuple[float, ...]
    small: str
    large: str
    max_new_tokens: int
    task: str = ""
    created: str = field(default="")

    def __post_init__(self) -> None:
        one_of("measure", self.measure, MEASURES)
        check_guarantee(self.epsilon, self.delta)
        object.__setattr__(self, "shares", tuple(float(one) for one in self.shares))
        if math.isnan(self.threshold) or not self.threshold >= 0.0:
            raise DeliberateError(f"a cascade's threshold {self.threshold} must be 0 or more")
        if len(self.shares) != len(THRESHOLDS):
            raise DeliberateError(
                f"a cascade has {len(self.shares)} shares: one for each of {len(THRESHOLDS)} "
                "thresholds is needed"
            )
        failures = round(self.observed * self.n)
        passes = binomial_p_value(failures, max(1, self.n), self.epsilon) <= self.delta
        if not math.isinf(self.threshold) and not passes:
            raise DeliberateError(
                f"the cascade states epsilon={self.epsilon:g} at delta={self.delta:g}, which a "
                f"loss of {self.observed:.6g} on {self.n} problems does not show: calibrate again"
            )

    def probability(self, confidence: float) -> float:
        """That an answer of this confidence loses nothing."""
        return float(self.calibrator(confidence))

    def threshold_within(self, budget: float, small: float, large: float) -> float:
        """The most careful threshold whose expected mean seconds are within a budget.

        It may be below the certified one: what is then lost is not bounded.

        Args:
            budget: mean seconds of an answer.
            small, large: mean seconds of either model's answer.

        Raises:
            DeliberateError: the small model alone takes longer.
        """
        for threshold, share in zip(THRESHOLDS, self.shares, strict=True):
            if small + share * large <= budget:
                return threshold
        raise DeliberateError(
            f"a budget of {1000 * budget:.3g} ms an answer cannot be met: the small model alone "
            f"takes {1000 * small:.3g} ms"
        )

    def check_models(self, small: str, large: str) -> None:
        """Raises unless both models have the weights that were calibrated.

        Raises:
            DeliberateError: names the one that differs.
        """
        for name, stated, found in (("small", self.small, small), ("large", self.large, large)):
            if stated != found:
                raise DeliberateError(
                    f"the cascade was calibrated with another {name} model ({stated[:12]}... "
                    f"stated, {found[:12]}... loaded): calibrate again"
                )

    def save(self, path: str | Path) -> None:
        """Writes JSON that appears whole or not at all."""
        from deliberate.utils.files import write_text

        raw = asdict(self) | {"calibrator": self.calibrator.to_dict()}
        raw["threshold"] = None if math.isinf(self.threshold) else self.threshold
        write_text(Path(path), json.dumps(raw, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CascadeCalibration:
        """Reads what `save` wrote.

        Raises:
            DeliberateError: a missing, damaged or foreign file.
        """
        raw = read_json(path)
        try:
            if not isinstance(raw, Mapping):
                raise DeliberateError("an object is needed")
            return build_from(cls, raw, "cascade")
        except DeliberateError as error:
            raise DeliberateError(f"{path}: {error}") from None


def cascade_losses(
    calibrator: Calibrator, record: CascadeRecord, threshold: float
) -> NDArray[np.float64]:
    """0/1 of each problem, ``[P]``: the large model is right and the cascade is not."""
    taken = calibrator(record.confidence) >= threshold
    right = np.where(taken, record.small_right, record.large_right)
    return accuracy_losses(record.large_right, right)


def handed_over(calibrator: Calibrator, confidence: ArrayLike, threshold: float) -> float:
    """Share of the answers that go to the large model."""
    return float((calibrator(confidence) < threshold).mean())


def fit_cascade(
    fitting: CascadeRecord,
    testing: CascadeRecord,
    *,
    measure: str,
    epsilon: float,
    delta: float,
    small: str,
    large: str,
    max_new_tokens: int,
    task: str = "",
) -> tuple[CascadeCalibration, Testing]:
    """Fits the curve on some problems and certifies a threshold on others.

    Args:
        fitting, testing: independent draws of the traffic that the guarantee is for.
        small, large: SHA-256 of the base weights.

    Returns:
        The calibration, whose threshold is infinite where no threshold passed, and the tests.

    Raises:
        DeliberateError: all small answers of `fitting` lose nothing, or all of them lose.
    """
    fine = fitting.small_right | ~fitting.large_right
    if fine.all() or not fine.any():
        which = "loses nothing" if fine.all() else "loses"
        raise DeliberateError(
            f"every one of {len(fine)} small answers {which}: a cascade needs both kinds, so use "
            "more or harder problems, or another small model"
        )
    # Logistic: an isotonic curve of some hundred answers has a few flat stretches, between which no
    # threshold can choose.
    calibrator = fit_logistic(fitting.confidence, fine)
    tests = fixed_sequence(
        THRESHOLDS,
        lambda threshold: cascade_losses(calibrator, testing, threshold),
        Risk.ACCURACY,
        epsilon=epsilon,
        delta=delta,
    )
    passed = tests.certified
    made = CascadeCalibration(
        measure=measure,
        calibrator=calibrator,
        threshold=math.inf if passed is None else passed.lambda_,
        epsilon=epsilon,
        delta=delta,
        n=len(testing.confidence),
        observed=0.0 if passed is None else passed.mean,
        shares=tuple(handed_over(calibrator, fitting.confidence, one) for one in THRESHOLDS),
        small=small,
        large=large,
        max_new_tokens=max_new_tokens,
        task=task,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return made, tests
