"""What each row of a policy table takes, as the latency controller looks it up."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class RowTimes:
    """Seconds per token of the rows of a policy table, the rows by rising lambda.

    Attributes:
        expected: of each row.
        rising: the least of a row and all more careful ones: rising, and equal to the row's own
            seconds wherever the row is worth taking.
        fastest: index of the most careful of the fastest rows.
        dense: of full depth, where the table ends with it; else infinite.
        least: of the earliest exit for every token, or of the fastest row.
        guard_row: thresholds of the earliest exit for every token, or those of full depth where
            that is as fast.
    """

    expected: tuple[float, ...]
    rising: tuple[float, ...]
    fastest: int
    dense: float
    least: float
    guard_row: tuple[float, ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[Sequence[float]],
        expected: Sequence[float],
        least: float | None = None,
    ) -> RowTimes:
        """
        Args:
            rows: thresholds, one row for each lambda.
            expected: seconds per token of each row, in any order.
            least: of the earliest exit for every token; None for that of the fastest row.

        Raises:
            DeliberateError: other numbers of rows and times, or a time that is not positive.
        """
        if len(expected) != len(rows) or not rows:
            raise DeliberateError(
                f"{len(expected)} expected times for {len(rows)} lambdas: give one per lambda"
            )
        for value in (*expected, *(() if least is None else (least,))):
            if not (math.isfinite(value) and value > 0):
                raise DeliberateError(f"expected time {value}: seconds per token must be positive")
        own = tuple(float(value) for value in expected)
        rising = tuple(itertools.accumulate(reversed(own), min))[::-1]
        full = all(math.isinf(value) for value in rows[-1])
        dense = own[-1] if full else math.inf
        lowest = rising[0] if least is None else min(float(least), rising[0])
        guard = tuple(rows[-1]) if lowest >= dense else (0.0,) * len(rows[0])
        return cls(own, rising, bisect_right(rising, rising[0]) - 1, dense, lowest, guard)
