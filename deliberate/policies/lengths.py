"""How many tokens an answer still has to go, from the lengths of earlier answers."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from deliberate.utils.errors import DeliberateError


class LengthPredictor:
    """Remaining length given the length so far: the residual life of earlier answers.

    With few earlier answers as long as this one, the limit counts as further answers that ran to
    it, so a deadline is planned for the worst until experience says otherwise.
    """

    def __init__(
        self, lengths: Iterable[int] = (), *, capacity: int = 512, enough: int = 4
    ) -> None:
        """
        Args:
            lengths: tokens of earlier answers, each at least 1.
            capacity: answers remembered, the latest.
            enough: answers at least as long as this one that make the limit irrelevant.
        """
        if capacity < 1 or enough < 1:
            raise DeliberateError(f"capacity {capacity} and enough {enough} must be at least 1")
        self._recent: deque[int] = deque(maxlen=capacity)
        # Sorted lengths, and their sums from each index on: replaced together, never changed, so
        # that another thread reads one or the other.
        self._state: tuple[list[int], list[int]] = ([], [0])
        self._enough = enough
        self._lock = threading.Lock()
        self._add(lengths)

    def __len__(self) -> int:
        return len(self._state[0])

    def observe(self, length: int) -> None:
        """An answer ended with `length` tokens."""
        self._add([length])

    def knows(self, tokens: int) -> bool:
        """Whether there were enough earlier answers longer than `tokens`."""
        return self._longer(self._state[0], tokens)[1] == 0

    def mean(self, tokens: int, limit: int) -> float:
        """Expected tokens after the first `tokens`, from 1 to ``limit - tokens``."""
        lengths, sums = self._state
        start, missing = self._longer(lengths, tokens)
        count = len(lengths) - start
        room = max(1, limit - tokens)
        total = sums[start] - count * tokens + missing * room
        return min(room, max(1.0, total / (count + missing)))

    def quantile(self, tokens: int, limit: int, share: float) -> int:
        """Remaining tokens that a `share` in [0, 1] of such answers do not exceed."""
        lengths, _ = self._state
        start, missing = self._longer(lengths, tokens)
        count = len(lengths) - start
        room = max(1, limit - tokens)
        index = int(share * (count + missing - 1) + 0.5)
        if index >= count:
            return room
        return min(room, max(1, lengths[start + index] - tokens))

    def _longer(self, lengths: list[int], tokens: int) -> tuple[int, int]:
        """Index of the first earlier answer longer than `tokens`, and how many are missing."""
        start = bisect_right(lengths, tokens)
        return start, max(0, self._enough - (len(lengths) - start))

    def _add(self, lengths: Iterable[int]) -> None:
        new = list(lengths)
        for length in new:
            if length < 1:
                raise DeliberateError(f"an answer of {length} tokens: at least 1 is needed")
        with self._lock:
            self._recent.extend(new)
            known = sorted(self._recent)
            sums = [0, *itertools.accumulate(reversed(known))]
            self._state = known, sums[::-1]


def recorded_lengths(meta: Mapping[str, Any]) -> list[int]:
    """Lengths of a calibration's answers: quantiles, or a spread around their mean where it holds
    only that; none where it holds neither."""
    given = meta.get("lengths")
    if isinstance(given, list) and all(isinstance(n, int) and n >= 1 for n in given):
        return list(given)
    fitted = meta.get("fitted")
    if not isinstance(fitted, Mapping):
        return []
    sequences, tokens = fitted.get("sequences"), fitted.get("tokens")
    if not isinstance(sequences, int) or not isinstance(tokens, int) or not 0 < sequences <= tokens:
        return []
    return [max(1, round(share * tokens / sequences)) for share in (0.5, 0.75, 1.0, 1.25, 1.5)]
