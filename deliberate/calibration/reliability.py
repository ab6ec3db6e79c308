"""How far claimed probabilities are from observed frequencies.

Bins hold equal numbers of tokens (Nguyen and O'Connor, EMNLP 2015): with equal widths nearly all
tokens of a good exit would fall into the last bin. The expected calibration error is biased upwards
on a small sample, since noise within a bin counts as error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.utils.errors import DeliberateError

BINS = 15
# A bin of fewer tokens shows noise; where values are few there are fewer bins.
_LEAST_BIN = 25
_Z = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Bin:
    """Tokens of like probability: how many, their mean probability, and how many agreed."""

    tokens: int
    probability: float
    agreeing: int

    @property
    def rate(self) -> float:
        """Share of the bin's tokens that agreed."""
        return self.agreeing / self.tokens

    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate, as if tokens were independent."""
        n, share = self.tokens, self.rate
        centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: bins of rising probability, and their weighted mean error."""

    bins: tuple[Bin, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all bins."""
        return sum(b.tokens for b in self.bins)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over tokens of |rate - probability| of their bin."""
        return sum(b.tokens * abs(b.rate - b.probability) for b in self.bins) / self.tokens

    @property
    def mean_gap(self) -> float:
        """Mean probability minus overall rate: above 0 where the exit claims too much."""
        return sum(b.tokens * b.probability - b.agreeing for b in self.bins) / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "tokens": self.tokens,
            "ece": self.ece,
            "mean_gap": self.mean_gap,
            "bins": [[b.tokens, b.probability, b.agreeing] for b in self.bins],
        }


def reliability(probabilities: ArrayLike, agrees: ArrayLike, bins: int = BINS) -> Reliability:
    """Bins of equal mass; equal probabilities share a bin, so there may be fewer.

    Args:
        probabilities: ``[T]`` in [0, 1].
        agrees: ``[T]`` bool.
        bins: at most so many.
    """
    p, right = np.asarray(probabilities, dtype=np.float64), np.asarray(agrees, dtype=bool)
    if len(p) == 0 or p.shape != right.shape:
        raise DeliberateError(
            f"reliability of {len(p)} probabilities and {len(right)} outcomes: one of each per "
            "token, at least one token"
        )
    if bins < 1:
        raise DeliberateError(f"bins={bins} must be at least 1")
    index = equal_mass_bins(p, bins)
    found = []
    for number in range(int(index.max()) + 1):
        inside = index == number
        found.append(Bin(int(inside.sum()), float(p[inside].mean()), int(right[inside].sum())))
    return Reliability(tuple(found))


def equal_mass_bins(values: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Bin number of each value ``[T]``: rising, none empty, equal values together.

    A value shared by more than its bin's worth of tokens (the surest claim, often) gets a bin of
    its own, and the others share the remaining bins evenly: else a handful of quantiles would all
    fall on that value and everything below it would be one bin.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    heavy = counts * bins >= len(values)
    light = np.where(heavy, 0, counts)
    total = int(light.sum())
    left = max(1, min(bins - int(heavy.sum()), total // _LEAST_BIN))
    place = (np.cumsum(light) - 0.5 * light) * left // max(1, total)
    # a bin neither reaches across a heavy value nor holds one together with others
    keys = np.stack([2 * np.cumsum(heavy) - heavy, np.where(heavy, 0, place)], axis=1)
    number = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    return number[inverse]
