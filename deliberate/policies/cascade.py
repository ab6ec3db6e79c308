"""Which of two models answers under one budget: a rule of probabilities and predicted times."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from deliberate.utils.errors import DeliberateError

_KEPT = 64
# Answers after which a model's time is known.
_ENOUGH = 4


class Model(StrEnum):
    """One of a cascade's two."""

    SMALL = "small"
    LARGE = "large"


class AnswerTimes:
    """Seconds of the newest answers of one model.

    Args:
        share: of the answers that a prediction covers.
    """

    def __init__(self, share: float = 0.9) -> None:
        self._share = share
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    def note(self, seconds: float) -> None:
        """An answer took so long."""
        self._seconds.append(seconds)

    @property
    def expected(self) -> float | None:
        """Seconds that `share` of the answers do not exceed; None while too few are known."""
        if len(self._seconds) < _ENOUGH:
            return None
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, math.ceil(self._share * len(ordered)) - 1)]

    @property
    def mean(self) -> float | None:
        """Mean seconds; None while too few are known."""
        known = len(self._seconds)
        return sum(self._seconds) / known if known >= _ENOUGH else None


@dataclass(frozen=True)
class CascadeRule:
    """What is decided, of times that are given: pure.

    Attributes:
        threshold: least probability at which the small answer is taken.

    What is not known (None) is taken to fit.
    """

    threshold: float

    def first(self, remaining: float, small: float | None, large: float | None) -> Model:
        """Which model answers first, with so many seconds left.

        The small one, where there is time for both or for nothing else; the large one where the
        time is enough for it alone, since a small answer that is not sure could not be handed over.

        Raises:
            DeliberateError: neither fits.
        """
        one, other = small or 0.0, large or 0.0
        if one + other <= remaining:
            return Model.SMALL
        if other <= remaining and large is not None:
            return Model.LARGE
        if one <= remaining:
            return Model.SMALL
        raise DeliberateError(
            f"a deadline in {1000 * remaining:.3g} ms cannot be met: the least that could be is "
            f"{1000 * min(one, other or one):.3g} ms"
        )

    def hands_over(self, probability: float, remaining: float, large: float | None) -> bool:
        """Whether the large model answers after the small one."""
        return probability < self.threshold and (large or 0.0) <= remaining
