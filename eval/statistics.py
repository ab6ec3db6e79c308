"""Estimates with the uncertainty that a small evaluation deserves.

Every interval is two-sided at 95 %. Tests and intervals for accuracy are for *paired* data:
all modes answer the same problems, so the discordant problems carry the information.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

CONFIDENCE_LEVEL = 0.95
SIGNIFICANCE = 0.05
BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, both ends included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"interval [{self.low}, {self.high}] needs finite ends, low <= high")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A point estimate; `interval` is None where the sample is too small to give one."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Spread:
    """Percentiles of a sample, in the unit of the sample."""

    median: float
    p90: float
    p99: float


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: `b` problems only the baseline solved, `c` only the mode solved."""

    b: int
    c: int
    p: float

    @property
    def distinguishable(self) -> bool:
        """Whether the test rejects equal accuracy at the 5 % level."""
        return self.p <= SIGNIFICANCE


def wilson_interval(correct: int, total: int) -> Interval:
    """Wilson's score interval for a proportion (JASA 22:209, 1927); [0, 1] when `total` is 0."""
    _check_counts(correct=correct, total=total)
    if correct > total:
        raise ValueError(f"correct = {correct} exceeds total = {total}")
    if total == 0:
        return Interval(0.0, 1.0)
    found = binomtest(correct, total).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    # At 0 and at `total` the score interval ends exactly at the estimate; rounding must not
    # push the estimate out of its own interval.
    share = correct / total
    return Interval(max(0.0, min(float(found.low), share)), min(1.0, max(float(found.high), share)))


def mcnemar_exact(b: int, c: int) -> McNemar:
    """Two-sided exact McNemar test: given b + c discordant pairs, b is Binomial(b + c, 1/2).

    With no discordant pair there is nothing to test and p is 1.
    """
    _check_counts(b=b, c=c)
    p = float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0
    return McNemar(b, c, min(1.0, p))


def paired_difference_interval(both: int, gained: int, lost: int, neither: int) -> Interval:
    """Newcombe's hybrid score interval for a difference of paired proportions.

    Method 10 of Newcombe, Statistics in Medicine 17:2635-2650, 1998: Wilson limits of the two
    proportions, combined with the continuity-corrected correlation phi.

    Args:
        both: problems solved by the mode and by the baseline.
        gained: solved by the mode only.
        lost: solved by the baseline only.
        neither: solved by neither.

    Returns:
        Interval of accuracy(mode) - accuracy(baseline), within [-1, 1].
    """
    _check_counts(both=both, gained=gained, lost=lost, neither=neither)
    total = both + gained + lost + neither
    if total == 0:
        return Interval(-1.0, 1.0)
    mode, baseline = (both + gained) / total, (both + lost) / total
    mode_limits = wilson_interval(both + gained, total)
    baseline_limits = wilson_interval(both + lost, total)
    covariance = float(both * neither - gained * lost)
    if covariance > 0:
        covariance = max(covariance - total / 2, 0.0)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def combine(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    difference = mode - baseline
    below = combine(mode - mode_limits.low, baseline_limits.high - baseline)
    above = combine(mode_limits.high - mode, baseline - baseline_limits.low)
    return Interval(max(-1.0, difference - below), min(1.0, difference + above))


@dataclass(frozen=True)
class PairedAccuracy:
    """Accuracy minus another's on the same problems: Newcombe's interval, McNemar's exact test."""

    difference: float
    interval: Interval
    mcnemar: McNemar


def paired_accuracy(own: Sequence[bool], baseline: Sequence[bool]) -> PairedAccuracy:
    """Compares two lists of right and wrong answers to the same problems, at least one."""
    pairs = list(zip(own, baseline, strict=True))
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    both = sum(a and b for a, b in pairs)
    return PairedAccuracy(
        difference=(gained - lost) / len(pairs),
        interval=paired_difference_interval(both, gained, lost, len(pairs) - both - gained - lost),
        mcnemar=mcnemar_exact(b=lost, c=gained),
    )


def bootstrap_ratio_of_medians(
    a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES
) -> Estimate:
    """median(a) / median(b) with a percentile bootstrap interval over problems.

    `a[i]` and `b[i]` belong to the same problem and are resampled together, since a problem that
    is slow in one mode is slow in the other. Fewer than two problems give no interval.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(
            f"ratio of medians needs two samples of one length, got {len(a)} and {len(b)}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all() and second.min() > 0):
        raise ValueError("ratio of medians needs finite samples and a positive denominator")
    value = float(np.median(first) / np.median(second))
    if first.size < 2:
        return Estimate(value, None)
    random = np.random.default_rng(seed)
    block = max(1, 200_000 // first.size)  # bounds memory: all at once is 100 MB for 5,000 problems
    ratios = np.empty(resamples)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        picks = random.integers(0, first.size, size=(rows, first.size))
        medians = np.median(first[picks], axis=1) / np.median(second[picks], axis=1)
        ratios[start : start + rows] = medians
    tail = 100 * (1 - CONFIDENCE_LEVEL) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Estimate(value, Interval(min(float(low), value), max(float(high), value)))


def ratio_of_sums(sums: ArrayLike, counts: ArrayLike, *, seed: int = 0) -> Estimate:
    """``sum(sums) / sum(counts)`` with a percentile bootstrap interval over the pairs.

    One pair alone gives no interval.
    """
    above: NDArray[np.float64] = np.asarray(sums, dtype=np.float64)
    below: NDArray[np.float64] = np.asarray(counts, dtype=np.float64)
    if above.shape != below.shape or above.ndim != 1 or not above.size or below.min() <= 0:
        raise ValueError("a ratio of sums needs pairs with positive counts")
    value = float(above.sum() / below.sum())
    if above.size < 2:
        return Estimate(value, None)
    draws = np.random.default_rng(seed).integers(
        0, above.size, size=(BOOTSTRAP_RESAMPLES, above.size)
    )
    made = above[draws].sum(axis=1) / below[draws].sum(axis=1)
    tail = 100 * (1 - CONFIDENCE_LEVEL) / 2
    low, high = np.percentile(made, [tail, 100 - tail])
    return Estimate(value, Interval(min(float(low), value), max(float(high), value)))


def percentiles(sample: Sequence[float]) -> Spread:
    """Median, P90 and P99 (linear interpolation) of a sample that is not empty."""
    if len(sample) == 0:
        raise ValueError("percentiles of an empty sample")
    median, p90, p99 = np.percentile(np.asarray(sample, dtype=np.float64), [50, 90, 99])
    return Spread(float(median), float(p90), float(p99))


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} = {count} must not be negative")
