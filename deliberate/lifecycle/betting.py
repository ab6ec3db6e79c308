"""Sequential tests of a mean by betting: they may be looked at after every observation.

An observer bets on every observation that the mean is larger than the hypothesis says. Under the
hypothesis no bet gains on average, so by Ville's inequality the wealth ever reaches 1 / alpha with
probability alpha at most, however long one looks (Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", JRSS B 86, 2024, arXiv:2010.09686, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.utils.errors import DeliberateError

_BETS = 10
# Of the most that may be bet: what remains is never all lost.
_MOST = 0.9
_LEAST = 0.05


class BettingTest:
    """Tests "the mean, given all before, is at most `limit`" of observations in [low, high].

    The wealth is the mean of that of bets of different sizes, since the best one depends on what
    the mean is in truth.

    Args:
        limit: of the mean, between `low` and `high`.
        low, high: bounds of an observation.

    Attributes:
        count: observations so far.
        mean: of them; NaN before the first.
        peak: largest log wealth so far, at least 0.

    Raises:
        DeliberateError: bounds or a limit that cannot be.
    """

    def __init__(self, limit: float, low: float = 0.0, high: float = 1.0) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low < limit < high):
            raise DeliberateError(f"limit {limit} must lie between the bounds {low} and {high}")
        self.limit, self.low, self.high = limit, low, high
        most = _MOST / (limit - low)
        self._bets = np.geomspace(min(_LEAST / (high - limit), most / 2), most, _BETS)
        self._logs = np.zeros(_BETS)
        self.count = 0
        self._sum = 0.0
        self.peak = 0.0

    @property
    def mean(self) -> float:
        """See the class."""
        return self._sum / self.count if self.count else math.nan

    def update(self, values: float | ArrayLike) -> float:
        """Counts observations in their order; returns `peak`.

        Raises:
            DeliberateError: one outside the bounds.
        """
        given = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if not ((given >= self.low) & (given <= self.high)).all():
            raise DeliberateError(f"an observation is outside [{self.low:g}, {self.high:g}]")
        if given.size:
            paths = self._logs + np.cumsum(
                np.log1p(self._bets * (given[:, None] - self.limit)), axis=0
            )
            self.peak = max(self.peak, float(_log_mean(paths).max()))
            self._logs = paths[-1]
            self.count += given.size
            self._sum += float(given.sum())
        return self.peak

    def rejects(self, alpha: float) -> bool:
        """Whether the hypothesis is rejected; under it ever with probability `alpha` at most."""
        return self.peak >= math.log(1 / alpha)

    def snapshot(self) -> dict[str, Any]:
        """All that it has seen, JSON-ready; `restore` goes on from it."""
        return {
            "count": self.count,
            "sum": self._sum,
            "peak": self.peak,
            "logs": self._logs.tolist(),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from the snapshot of a test with the same limit.

        Raises:
            DeliberateError: it is none.
        """
        try:
            logs = np.asarray(snapshot["logs"], dtype=np.float64)
            count, total, peak = (
                int(snapshot["count"]),
                float(snapshot["sum"]),
                float(snapshot["peak"]),
            )
        except (KeyError, TypeError, ValueError):
            raise DeliberateError("this is no snapshot of a test") from None
        if logs.shape != self._logs.shape or not np.isfinite(logs).all() or count < 0:
            raise DeliberateError("this snapshot is of another test")
        self._logs, self.count, self._sum, self.peak = logs, count, total, peak


def _log_mean(paths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the mean of exp over the last axis."""
    top = paths.max(axis=-1)
    made: NDArray[np.float64] = top + np.log(np.exp(paths - top[..., None]).mean(axis=-1))
    return made
