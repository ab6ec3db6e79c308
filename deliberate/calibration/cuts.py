"""Where a threshold may lie, and what it gives: the one place that sorts scores and adds them up.

Equal scores exit together, so that only the distinct values are possible thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Cuts(NamedTuple):
    """Every threshold that the scores of T tokens allow, from the strictest on.

    Attributes:
        scores: float ``[U]``, the distinct scores, falling: a threshold takes those at or above it.
        counts: int64 ``[U]``, tokens at or above each.
        totals: float64 ``[U]``, the sum of their values.
    """

    scores: NDArray[np.floating]
    counts: NDArray[np.int64]
    totals: NDArray[np.float64]


def cuts(scores: NDArray[np.floating], values: NDArray[np.floating]) -> Cuts:
    """The thresholds of ``[T]`` scores, and the sums of ``[T]`` values at or above each.

    Values that are whole numbers are summed exactly.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    totals = np.cumsum(values[order].astype(np.float64))
    # The last of equal scores: a threshold there takes all of them.
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], [True] * min(1, len(ordered))))
    return Cuts(ordered[last], last + 1, totals[last])
