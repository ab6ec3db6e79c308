"""How many tokens an answer still has to go, from the lengths of earlier answers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable

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
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._suffix: list[int] = [0]  # sums of the sorted lengths from each index on
        self._capacity = capacity
        self._enough = enough
        for length in lengths:
            self._insert(length)
        self._sum()

    def __len__(self) -> int:
        return len(self._sorted)

    def observe(self, length: int) -> None:
        """An answer ended with `length` tokens."""
        self._insert(length)
        self._sum()

    def knows(self, tokens: int) -> bool:
        """Whether there were enough earlier answers longer than `tokens`."""
        return self._longer(tokens)[1] == 0

    def mean(self, tokens: int, limit: int) -> float:
        """Expected tokens after the first `tokens`, from 1 to ``limit - tokens``."""
        start, missing = self._longer(tokens)
        count = len(self._sorted) - start
        room = max(1, limit - tokens)
        total = self._suffix[start] - count * tokens + missing * room
        return min(room, max(1.0, total / (count + missing)))

    def quantile(self, tokens: int, limit: int, share: float) -> int:
        """Remaining tokens that a `share` in [0, 1] of such answers do not exceed."""
        start, missing = self._longer(tokens)
        count = len(self._sorted) - start
        room = max(1, limit - tokens)
        index = int(share * (count + missing - 1) + 0.5)
        if index >= count:
            return room
        return min(room, max(1, self._sorted[start + index] - tokens))

    def _longer(self, tokens: int) -> tuple[int, int]:
        """Index of the first earlier answer longer than `tokens`, and how many are missing."""
        start = bisect_right(self._sorted, tokens)
        return start, max(0, self._enough - (len(self._sorted) - start))

    def _insert(self, length: int) -> None:
        if length < 1:
            raise DeliberateError(f"an answer of {length} tokens: at least 1 is needed")
        if len(self._recent) == self._capacity:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(length)
        insort(self._sorted, length)

    def _sum(self) -> None:
        suffix = [0]
        for length in reversed(self._sorted):
            suffix.append(suffix[-1] + length)
        self._suffix = suffix[::-1]
