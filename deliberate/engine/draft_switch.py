"""Whether to draft at all: measured seconds per accepted token with drafts and without.

Verifying drafts and making them takes time; where full depth accepts too few of them, or a further
token of a pass takes nearly as long as a pass, drafting loses. A few tokens are decoded without
drafts now and then, and what passes with drafts lose or gain against that is summed up. Once the
time of a few tokens is lost there are no drafts for a number of tokens, which grows each time that
it is lost again: drafting loses a small part of the time in all, and when the text or the machine
changes that is found out. A short run of bad luck is no reason to stop where drafts gained before.

The output does not depend on it, only the time does.
"""

from __future__ import annotations

import math
import threading
from collections import deque

# Tokens of a sequence without drafts that are timed, after so many with drafts at first.
PROBE, BEFORE = 4, 6
# Tokens with drafts after which the time without is measured again.
REFRESH = 256
# What drafting of one sequence may lose, and what gains before count against it, in tokens without.
LOSS, CREDIT = 3.0, 16.0
# Tokens without drafts once that is lost, how many times longer each further time, and at most.
OFF, LONGER, LONGEST_OFF = 64, 4, 1024
# Tokens without drafts whose times count.
_PLAIN = 16
# A pass longer than this many of the usual was interrupted.
_OUTLIER = 4.0


class Window:
    """Seconds per token of the latest passes.

    Args:
        most: tokens that count.

    Attributes:
        tokens: that are counted.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._passes: deque[tuple[float, int]] = deque()
        self.tokens, self._seconds = 0, 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """A pass took so long and gave so many tokens."""
        if self.tokens and seconds > _OUTLIER * self.each * tokens:
            return  # an interruption
        self._passes.append((seconds, tokens))
        self.tokens += tokens
        self._seconds += seconds
        while self.tokens - self._passes[0][1] >= self._most:
            first, count = self._passes.popleft()
            self._seconds -= first
            self.tokens -= count

    @property
    def each(self) -> float:
        """Seconds per token; 0 before the first."""
        return self._seconds / self.tokens if self.tokens else 0.0


class DraftSwitch:
    """Of one source of drafts; lives as long as its estimates, and threads may share it.

    Args:
        rows: sequences that share passes, about; all of them are told and asked.
        plain: times without drafts of any source, where several share them.

    Attributes:
        probing: it is off to measure the time without drafts, not because they lose.
    """

    def __init__(self, rows: int = 1, plain: Window | None = None) -> None:
        self._rows = rows
        # Over many sequences chance evens out: the sum strays by the root of their number.
        self._loss, self._credit = LOSS * math.sqrt(rows), CREDIT * math.sqrt(rows)
        self._lock = threading.Lock()
        self._off = 0  # passes of a sequence for which it stays off
        self._next_off = OFF
        self.probing = False
        self.plain = Window(_PLAIN * rows) if plain is None else plain
        self._since = 0  # tokens with drafts since the time without was measured
        self._lost = 0.0  # by drafting, in tokens without
        self._usual: float | None = None  # seconds of a pass with drafts

    def on(self) -> bool:
        """Whether a sequence is to draft before its next pass."""
        if self._off <= 0:
            return True
        self._off -= 1
        return False

    @property
    def off_passes(self) -> int:
        """Passes of a sequence before there may be drafts again."""
        return max(0, self._off)

    def skip(self, passes: int) -> None:
        """So many passes were run that nobody asked about."""
        self._off = max(0, self._off - passes)

    def note(self, seconds: float, tokens: int, *, drafting: bool) -> None:
        """A pass, and its drafts, took a sequence so long and gave it so many tokens."""
        with self._lock:
            if not drafting:
                self.plain.add(seconds, tokens)
                return
            self._since += tokens
            limit = REFRESH if self.plain.tokens else BEFORE
            if self._since >= limit * self._rows:
                self._off, self.probing, self._since = PROBE * self._rows, True, 0
            usual = self._usual
            if usual is not None and seconds > _OUTLIER * usual:
                return  # an interruption
            self._usual = seconds if usual is None else usual + (seconds - usual) / 16
            if self.plain.tokens:
                self._count(seconds / self.plain.each - tokens)

    def _count(self, lost: float) -> None:
        self._lost = max(self._lost + lost, -self._credit)
        if self._lost > self._loss:
            self._off, self.probing = self._next_off * self._rows, False
            self._next_off = min(LONGER * self._next_off, LONGEST_OFF)
            self._lost, self._since = 0.0, 0
        elif self._lost < -self._loss:
            self._next_off = OFF
