"""From an exit's raw score to the probability that its token is the full-depth token.

Two forms, fitted with scikit-learn and applied with numpy alone: isotonic regression (Zadrozny and
Elkan, KDD 2002) and logistic regression on the score's log-odds (Platt, 1999). Both never fall
with the score, so a wanted probability is a least score, and a policy on probabilities is a policy
of thresholds. Which of the two serves an exit is decided by the log loss on held-out sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import build_from

MIN_SEQUENCES = 20
MIN_TOKENS = 500
MIN_OF_EACH = 10
"""Fewer disagreements (or agreements) than this say too little of either curve."""

_FOLDS = 5
# Confidences are float32: what is nearer to 0 or 1 is rounding, and would dominate a logit.
_EDGE = 1e-7
# The weight of the invented counterexample at each end of an isotonic fit.
_COUNTEREXAMPLE = 0.5


class Form(StrEnum):
    """The shape of a calibrator."""

    ISOTONIC = "isotonic"
    LOGISTIC = "logistic"


@dataclass(frozen=True)
class Calibrator:
    """A non-decreasing map from raw scores to probabilities strictly between 0 and 1.

    Attributes:
        form: which of the two.
        scores, probabilities: isotonic: knots, both non-decreasing, with straight lines between
            and constants outside. Empty for logistic.
        slope, intercept: logistic: p = sigmoid(slope * logit(score) + intercept), slope >= 0,
            held within `floor` of 0 and 1.
        log_loss: mean held-out log loss (nats) by form, which decided.
        tokens, agreeing: size of the sample it was fitted on.
    """

    form: Form
    scores: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()
    slope: float = 0.0
    intercept: float = 0.0
    log_loss: Mapping[str, float] | None = None
    tokens: int = 0
    agreeing: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", Form(self.form))
        object.__setattr__(self, "scores", tuple(float(x) for x in self.scores))
        object.__setattr__(self, "probabilities", tuple(float(x) for x in self.probabilities))
        numbers = (*self.scores, *self.probabilities, self.slope, self.intercept)
        if not all(math.isfinite(x) for x in numbers):
            raise DeliberateError("calibrator: every number must be finite")
        if not 0 <= self.agreeing <= self.tokens:
            raise DeliberateError(
                f"calibrator: agreeing={self.agreeing} must lie in 0..tokens={self.tokens}"
            )
        if self.form is Form.LOGISTIC:
            if self.slope < 0:
                raise DeliberateError(f"calibrator: slope {self.slope} must not be negative")
            return
        if not self.scores or len(self.scores) != len(self.probabilities):
            raise DeliberateError(
                f"calibrator: {len(self.scores)} scores for {len(self.probabilities)} "
                "probabilities: one of each per knot, at least one knot"
            )
        for name, knots in (("scores", self.scores), ("probabilities", self.probabilities)):
            if list(knots) != sorted(knots):
                raise DeliberateError(f"calibrator: {name} must not fall from knot to knot")
        if not 0.0 < self.probabilities[0] <= self.probabilities[-1] < 1.0:
            raise DeliberateError("calibrator: probabilities must lie strictly between 0 and 1")

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of raw scores, of the same shape, float64."""
        values = np.asarray(scores, dtype=np.float64)
        if self.form is Form.ISOTONIC:
            return np.interp(values, self.scores, self.probabilities)
        found = _sigmoid(self.slope * _logit(values) + self.intercept)
        return np.clip(found, self.floor, 1.0 - self.floor)

    @property
    def floor(self) -> float:
        """No probability is nearer to 0 or 1 than this: what half an event in the sample is worth.

        Isotonic fits hold to it by construction; a logistic curve would go on past its evidence.
        """
        return 0.5 / (self.tokens + 1) if self.tokens else _EDGE

    def least_score(self, probability: float) -> float:
        """The least raw score whose probability reaches `probability`.

        0 where every score does (measures are confidences from 0 up), infinity where none does.
        """
        if not 0.0 <= probability <= 1.0:
            raise DeliberateError(f"probability {probability} is outside [0, 1]")
        if float(self(0.0)) >= probability:
            return 0.0
        if float(self(1.0)) < probability:
            return math.inf
        if self.form is Form.LOGISTIC:
            wanted = (math.log(probability) - math.log1p(-probability) - self.intercept) / (
                self.slope
            )
            return float(_sigmoid(np.float64(wanted)))
        right = int(np.searchsorted(self.probabilities, probability, side="left"))
        left = right - 1
        rise = self.probabilities[right] - self.probabilities[left]
        share = (probability - self.probabilities[left]) / rise
        return self.scores[left] + share * (self.scores[right] - self.scores[left])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        shared: dict[str, Any] = {
            "form": str(self.form),
            "log_loss": None if self.log_loss is None else dict(self.log_loss),
            "tokens": self.tokens,
            "agreeing": self.agreeing,
        }
        if self.form is Form.LOGISTIC:
            return shared | {"slope": self.slope, "intercept": self.intercept}
        return shared | {
            "scores": list(self.scores),
            "probabilities": list(self.probabilities),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Calibrator:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: a missing or unknown key, or a value that cannot be.
        """
        return build_from(cls, raw, "calibrator")


def fit_calibrator(
    scores: ArrayLike,
    agrees: ArrayLike,
    sequence: ArrayLike,
    *,
    name: str = "the exit",
    seed: int = 0,
) -> Calibrator:
    """The better of both forms by log loss on held-out sequences, fitted on everything.

    Tokens of one sequence are alike, so folds are made of whole sequences.

    Args:
        scores: ``[T]`` finite raw scores.
        agrees: ``[T]`` bool, whether the exit's token is the full-depth token.
        sequence: ``[T]`` int, which sequence each token is from.
        name: of the exit, for messages.
        seed: of the folds.

    Raises:
        DeliberateError: an empty, single-class or too small sample, or scores that are not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    right = np.asarray(agrees, dtype=bool)
    groups = np.asarray(sequence)
    check_sample(values, right, groups, name)
    names = np.unique(groups)
    fold_of = np.empty(len(names), dtype=np.int64)
    fold_of[np.random.default_rng(seed).permutation(len(names))] = np.arange(len(names)) % _FOLDS
    folds = fold_of[np.searchsorted(names, groups)]
    losses = {form: np.full(len(values), math.inf) for form in Form}
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # one column of numbers: more threads only wait for each other
        for fold in range(_FOLDS):
            held = folds == fold
            for form in Form:
                fitted = _fit(form, values[~held], right[~held])
                if fitted is not None:
                    losses[form][held] = token_log_loss(fitted(values[held]), right[held])
        best = _choose(losses, np.searchsorted(names, groups))
        fitted = _fit(best, values, right)
    assert fitted is not None  # the sample has both classes
    return Calibrator(
        form=best,
        scores=fitted.scores,
        probabilities=fitted.probabilities,
        slope=fitted.slope,
        intercept=fitted.intercept,
        log_loss={
            str(form): float(loss.mean())
            for form, loss in losses.items()
            if np.isfinite(loss).all()
        },
        tokens=len(values),
        agreeing=int(right.sum()),
    )


class TooFewError(DeliberateError):
    """A sample is too small to calibrate on.

    Attributes:
        problem: what is too few, without the advice.
        sequences: in the sample; these calibrate, whatever else was recorded.
        times: so many times as many are needed.
    """

    def __init__(self, problem: str, sequences: int, times: float) -> None:
        self.problem, self.sequences, self.times = problem, sequences, times
        enough = math.ceil(sequences * times)
        super().__init__(f"{problem}: calibrate on about {enough} sequences instead of {sequences}")


def check_sample(
    scores: NDArray[np.float64], agrees: NDArray[np.bool_], sequence: NDArray[Any], name: str
) -> None:
    """Raises a one-line error where a sample cannot carry a calibration."""
    if not len(scores) == len(agrees) == len(sequence):
        raise DeliberateError(
            f"{name}: {len(scores)} scores, {len(agrees)} agreements and {len(sequence)} sequence "
            "numbers: one of each per token"
        )
    if len(scores) == 0:
        raise DeliberateError(f"{name}: the calibration set is empty: record some answers first")
    if not np.isfinite(scores).all():
        raise DeliberateError(f"{name}: scores hold NaN or infinity")
    size, hits, sequences = len(scores), int(agrees.sum()), len(np.unique(sequence))
    if hits in (0, size):
        which = "agrees" if hits else "disagrees"
        raise DeliberateError(
            f"{name}: every one of {size} tokens {which} with full depth: calibration needs both "
            "kinds, so use more or other problems"
        )
    for found, needed, what in (
        (sequences, MIN_SEQUENCES, "sequences"),
        (size, MIN_TOKENS, "tokens"),
        (min(hits, size - hits), MIN_OF_EACH, "disagreements" if 2 * hits > size else "agreements"),
    ):
        if found < needed:
            about = f"{name}: {found} {what} are too few to calibrate on, {needed} are needed"
            raise TooFewError(about, sequences, needed / max(1, found))


def token_log_loss(probabilities: ArrayLike, agrees: ArrayLike) -> NDArray[np.float64]:
    """-log of the probability given to what happened, in nats, of the shape of the arguments."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-15, 1 - 1e-15)
    return -np.where(np.asarray(agrees, dtype=bool), np.log(p), np.log1p(-p))


def _choose(losses: Mapping[Form, NDArray[np.float64]], sequence: NDArray[np.int64]) -> Form:
    """Logistic, unless isotonic is better by more than one standard error over sequences.

    A logistic curve goes on rising where isotonic knots lie flat, which is where a policy looks
    for the tokens that are surest of all; so it is not given up for noise.
    """
    gain = losses[Form.LOGISTIC] - losses[Form.ISOTONIC]
    if not np.isfinite(gain).all():
        return Form.ISOTONIC
    sums, counts = np.bincount(sequence, weights=gain), np.bincount(sequence)
    mean = float(gain.mean())
    spread = sums - mean * counts
    error = math.sqrt(float(spread @ spread) * len(sums) / (len(sums) - 1)) / len(gain)
    return Form.ISOTONIC if mean > error else Form.LOGISTIC


def _fit(form: Form, scores: NDArray[np.float64], agrees: NDArray[np.bool_]) -> Calibrator | None:
    """One form on one sample; None where a logistic regression has only one class to see."""
    if form is Form.ISOTONIC:
        return fit_isotonic(scores, agrees)
    if agrees.all() or not agrees.any():
        return None
    return fit_logistic(scores, agrees)


def fit_isotonic(scores: NDArray[np.float64], agrees: NDArray[np.bool_]) -> Calibrator:
    """Isotonic regression of ``[T]`` agreements on ``[T]`` scores, at least one of each.

    Probabilities stay strictly between 0 and 1, also where all scores agree.
    """
    from sklearn.isotonic import IsotonicRegression

    # Half a disagreement at the highest score and half an agreement at the lowest: a run of n
    # agreeing tokens then claims n / (n + 1/2), never certainty, and stays monotone.
    x = np.concatenate([scores, [scores.max(), scores.min()]])
    y = np.concatenate([agrees.astype(np.float64), [0.0, 1.0]])
    weight = np.concatenate([np.ones(len(scores)), [_COUNTEREXAMPLE] * 2])
    model = IsotonicRegression(out_of_bounds="clip").fit(x, y, sample_weight=weight)
    knots = np.asarray(model.X_thresholds_, dtype=np.float64)
    values = np.maximum.accumulate(np.asarray(model.y_thresholds_, dtype=np.float64))
    return Calibrator(Form.ISOTONIC, tuple(knots), tuple(values))


def fit_logistic(scores: NDArray[np.float64], agrees: NDArray[np.bool_]) -> Calibrator:
    """Logistic regression of ``[T]`` agreements on the log-odds of ``[T]`` scores, both kinds among
    them; the base rate where agreement does not rise with the score."""
    from sklearn.linear_model import LogisticRegression

    z = _logit(scores)
    centre, spread = float(z.mean()), float(z.std()) or 1.0
    feature = ((z - centre) / spread)[:, None]
    # A weak penalty: with thousands of tokens it only keeps a separable sample finite.
    model = LogisticRegression(C=10.0, max_iter=1000).fit(feature, agrees.astype(int))
    slope, intercept = float(model.coef_[0, 0]) / spread, float(model.intercept_[0])
    if slope <= 0:  # a measure that does not rise with agreement tells nothing: the base rate
        rate = float(agrees.mean())
        slope, intercept = 0.0, math.log(rate / (1 - rate))
    else:
        intercept -= slope * centre
    return Calibrator(Form.LOGISTIC, slope=slope, intercept=intercept, tokens=len(scores))


def _logit(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(scores, _EDGE, 1.0 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(x: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))
