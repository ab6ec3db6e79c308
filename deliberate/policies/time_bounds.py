"""How far predicted times must be stretched so that a stated share of deadlines is kept.

A prediction says what is likely; a deadline needs what can be relied on. The ratio of the time that
an answer took to what was predicted for it is remembered apart for each tier (deadlines within a
factor of two of each other) and each load, and a high quantile of these ratios is the factor by
which the next prediction is stretched. The level of the quantile is moved after each answer with a
deadline (adaptive conformal inference, Gibbs and Candes, 2021): a missed deadline raises it, a kept
one lowers it, so that over time the stated share is kept whatever the ratios do, and no more is
refused than that needs.
"""

from __future__ import annotations

import math
from collections import deque

from deliberate.utils.errors import DeliberateError

# Ratios at a load below which those of the nearest load of the tier speak for it.
_ENOUGH = 16
# The share left out stays where answers can still move it back soon, and a stall of the machine
# that no refusal would have prevented does not decide alone.
_LEAST_MISS, _MOST_MISS = 0.05, 0.7
# Of its deadline: what an answer takes beyond that counts as this much, since once it is late the
# schedulers serve it last, and one that was starved for seconds would speak for all others.
_LATE = 1.25


class TimeBounds:
    """Factors for predicted times; kept by one thread.

    Args:
        share: of the deadlines that shall be kept; in (0, 1).
        window: newest answers of a tier and load that count.
        rate: by which a missed deadline moves the level of the quantile.
        forget: seconds without an answer after which a factor is nearer to 1 by e: where all of a
            tier is refused, nothing would be learnt, and so nothing ever taken again.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    def __init__(
        self, share: float, *, window: int = 64, rate: float = 0.05, forget: float = 2.0
    ) -> None:
        if not 0.0 < share < 1.0:
            raise DeliberateError(f"share in time {share} is outside (0, 1)")
        if window < _ENOUGH or not 0.0 < rate < 1.0 or not forget > 0.0:
            raise DeliberateError(
                f"window {window}, rate {rate} and forget {forget}: from {_ENOUGH}, in (0, 1) and "
                "above 0 are allowed"
            )
        self._miss = 1.0 - share
        self._window, self._rate, self._forget = window, rate, forget
        self._levels: dict[int, float] = {}
        self._ratios: dict[int, dict[int, _Ratios]] = {}

    def factor(self, allowed: float, load: int, now: float) -> float:
        """By what to stretch a predicted time.

        Args:
            allowed: seconds of the deadline, which name the tier.
            load: requests that are here.
            now: second.
        """
        tier, near = _tier(allowed), _near(load)
        known = {
            one: ratios
            for one, ratios in self._ratios.get(tier, {}).items()
            if len(ratios.newest) >= _ENOUGH
        }
        if not known:
            return 1.0
        found = known[min(known, key=lambda one: (abs(one - near), one))]
        ratio = found.quantile(self._levels.get(tier, self._miss))
        age = max(0.0, now - found.last)
        return math.exp(math.log(ratio) * math.exp(-age / self._forget))

    def note(self, allowed: float, load: int, predicted: float, took: float, now: float) -> None:
        """An answer with a deadline has ended.

        Args:
            allowed, load: see `factor`; the load is the highest that it has met.
            predicted: seconds, not stretched, when it was taken.
            took: seconds.
            now: second.
        """
        if not (predicted > 0.0 and took > 0.0):
            return
        tier, near = _tier(allowed), _near(load)
        level = self._levels.get(tier, self._miss)
        level += self._rate * (self._miss - (took > allowed))
        self._levels[tier] = min(_MOST_MISS, max(_LEAST_MISS, level))
        ratios = self._ratios.setdefault(tier, {}).setdefault(near, _Ratios(self._window))
        ratios.newest.append(min(took, _LATE * allowed) / predicted)
        ratios.last = now


class _Ratios:
    """The newest ratios at one tier and load, and when the last of them came."""

    def __init__(self, window: int) -> None:
        self.newest: deque[float] = deque(maxlen=window)
        self.last = 0.0

    def quantile(self, miss: float) -> float:
        """Conformal: of n ratios the one in place (n + 1) (1 - miss), rounded up."""
        place = math.ceil((len(self.newest) + 1) * (1.0 - miss))
        return sorted(self.newest)[min(place, len(self.newest)) - 1]


def _tier(allowed: float) -> int:
    return round(math.log2(allowed))


def _near(load: int) -> int:
    """Loads within a fifth of each other are one."""
    return round(2 * math.log2(max(1, load)))
