"""Which exits to ask, and how far to draft, in exact mode: decided online from what it costs.

A draft that is refused costs time, and so does asking an exit that never lets anybody go. The
planner keeps running estimates of how often each exit lets a token go, how often the full depth
agrees, and how long passes take on this machine, and from them the seconds that asking an exit
saves. An exit that loses time rests, for longer each time, and is then tried again. How many
tokens may wait is DEL's objective (arXiv:2504.05598) in measured seconds: the expected number of
tokens of a round, (1 - a^(d+1)) / (1 - a), over its time d l + L.

Above both stands a plain comparison: seconds per verified token with the exits asked, against those
of whole passes in which none is. Where drafting loses, all exits rest.

Output is not affected, only time; so timings may steer exact mode, and no other.
"""

from __future__ import annotations

import functools
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Observations after which older ones have lost half of their weight.
MEMORY = 128
# Asks of an exit before it is judged, when new and when it is tried again.
TRIAL, RETRIAL = 12, 6
# Whole passes before anything is drafted, to know what full depth costs.
FIRST_WHOLE = 4
# Whole passes of a later look.
GLANCE = 2
# Verified tokens after which drafting is compared with whole passes.
ROUND = 16
# Verified tokens after which whole passes are timed again.
REFRESH = 256
# Tokens for which an exit rests, at first and at most.
REST, LONGEST_REST = 32, 1024


@dataclass
class _Tally:
    """Counts that forget."""

    total: float = 0.0
    hits: float = 0.0

    def add(self, hit: bool) -> None:
        self.total += 1.0
        self.hits += hit
        if self.total > 2 * MEMORY:
            self.fade(0.5)

    def fade(self, share: float) -> None:
        self.total *= share
        self.hits *= share

    def rate(self, prior_hits: float = 0.0, prior: float = 0.0) -> float:
        weight = self.total + prior
        return (self.hits + prior_hits) / weight if weight else 0.0


@dataclass
class _Pace:
    """Seconds per verified token, forgetting."""

    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        if self.tokens > MEMORY:
            self.seconds, self.tokens = self.seconds / 2, self.tokens / 2
        self.seconds += seconds
        self.tokens += tokens

    @property
    def each(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass
class _Line:
    """Least squares of seconds against tokens of a pass, forgetting."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    rows: float = 0.0

    def add(self, rows: int, tokens: int, seconds: float) -> None:
        keep = 1.0 - 1.0 / MEMORY
        if self.n > 4 and seconds > 8.0 * self.y / self.n:
            return  # an interruption, not a cost
        self.n = self.n * keep + 1.0
        self.x = self.x * keep + tokens
        self.y = self.y * keep + seconds
        self.xx = self.xx * keep + tokens * tokens
        self.xy = self.xy * keep + tokens * seconds
        self.rows = self.rows * keep + rows

    @property
    def slope(self) -> float:
        """Seconds of one more token in a pass; 0 where every pass had the same size."""
        spread = self.n * self.xx - self.x * self.x
        if self.n < 4 or spread < 1e-9 * self.n * self.xx:
            return 0.0
        return max(0.0, (self.n * self.xy - self.x * self.y) / spread)

    @property
    def alone(self) -> float:
        """Seconds per row of a pass with one token of each."""
        if self.n == 0:
            return 0.0
        slope = self.slope
        fixed = max(0.0, self.y / self.n - slope * self.x / self.n)
        return fixed / (self.rows / self.n) + slope


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that changes a planner's estimates, for threads that decode with it at once."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class DraftPlanner:
    """Running estimates of one model's exits; lives as long as the model, over generations.

    Generations of several threads share it. It then learns from all of them; whatever it says, the
    tokens of exact mode are the same.

    Args:
        exits: how many.
        max_pending: most tokens that may wait.
        read_seconds: of asking each exit once.
        glance: whole passes to look again at what they take; as many as are run in one call, or
            what a call costs beside them would count in full.
    """

    def __init__(
        self, exits: int, max_pending: int, read_seconds: Sequence[float], *, glance: int = GLANCE
    ) -> None:
        self._lock = threading.RLock()
        self._glance = glance
        self._read_seconds = tuple(read_seconds)
        self._max_pending = max_pending
        self._asked = [_Tally() for _ in range(exits)]
        self._agreed = [_Tally() for _ in range(exits)]
        self._segments = [_Line() for _ in range(exits + 1)]
        self._lost = _Tally()
        self._resting = [max(FIRST_WHOLE, glance)] * exits
        self._drafted_pace = _Pace()
        # Seconds of the latest whole passes; their median, because the first ones are slow.
        self._whole: deque[float] = deque(maxlen=9)
        self._since_whole = 0
        self._next_pause = REST
        self._unsettled = 0.0
        self._next_rest = [REST] * exits
        self._needed = [TRIAL] * exits
        self.cap = max_pending

    def asks(self, exit_index: int) -> bool:
        """Whether this exit is worth asking now."""
        return self._resting[exit_index] <= 0

    @property
    def resting(self) -> bool:
        """Whether no exit is worth asking now."""
        return min(self._resting) > 0

    @property
    def rest(self) -> int:
        """Tokens before any exit is asked again."""
        return min(self._resting)

    def read_seconds(self, exit_index: int) -> float:
        """What asking an exit once takes."""
        return self._read_seconds[exit_index]

    @_one_at_a_time
    def token(self) -> None:
        """One more token was fed."""
        for index, left in enumerate(self._resting):
            if left > 0:
                self._resting[index] = left - 1

    @_one_at_a_time
    def progress(self, seconds: float, tokens: int) -> None:
        """One step of the loop took so long and verified so many tokens."""
        self._unsettled += seconds
        if tokens <= 0:
            return
        drafting = not self.resting
        seconds, self._unsettled = self._unsettled, 0.0
        if not drafting:
            self._whole.append(seconds / tokens)
            return
        pace = self._drafted_pace
        if not pace.tokens or seconds < 8.0 * pace.each * (tokens + 1):  # else an interruption
            pace.add(seconds, tokens)
        self._since_whole += tokens
        self._compare()

    def _compare(self) -> None:
        drafted = self._drafted_pace
        if drafted.tokens < ROUND or not self._whole:
            return
        if drafted.each > statistics.median(self._whole):
            self._pause(self._next_pause)
            self._next_pause = min(2 * self._next_pause, LONGEST_REST)
            self._drafted_pace = _Pace()
        elif self._since_whole >= REFRESH:
            # The machine may have changed: what whole passes take is looked at again.
            self._next_pause = max(REST, self._next_pause // 2)
            self._pause(self._glance)

    def _pause(self, tokens: int) -> None:
        """All exits rest for so many tokens."""
        self._resting = [max(left, tokens) for left in self._resting]
        self._since_whole = 0

    @_one_at_a_time
    def segment(self, index: int, rows: int, tokens: int, seconds: float) -> None:
        """A pass of a segment took so long, the reading of the exit above it not included."""
        self._segments[index].add(rows, tokens, seconds)

    @_one_at_a_time
    def asked(self, exit_index: int, left: bool) -> None:
        """An exit was asked and let the token go or not."""
        self._asked[exit_index].add(left)

    @_one_at_a_time
    def judged(self, exit_index: int, agreed: bool, discarded: int = 0) -> None:
        """The full depth has agreed with a draft, or refused it with `discarded` later ones."""
        self._agreed[exit_index].add(agreed)
        if not agreed:
            self._lost.total += 1.0
            self._lost.hits += discarded
            if self._lost.total > MEMORY:
                self._lost.fade(0.5)

    def value(self, exit_index: int) -> float:
        """Seconds that asking this exit saves on average, negative where it loses."""
        above = self._segments[exit_index + 1 :]
        rider = sum(segment.slope for segment in above)
        saved = max(0.0, sum(segment.alone for segment in above) - rider)
        shallow = self._segments[0].alone + self._read_seconds[0]
        lost = self._lost.rate(1.0, 1.0) * shallow
        agrees = self._agreed[exit_index].rate(2.0, 2.0)
        leaves = self._asked[exit_index].rate()
        gain = leaves * (agrees * saved - (1.0 - agrees) * lost)
        return gain - self._read_seconds[exit_index]

    @_one_at_a_time
    def review(self) -> None:
        """After a pass to the top: sends exits that lose time to rest, and sets the cap."""
        if any(segment.n == 0 for segment in self._segments):
            return
        for index, asked in enumerate(self._asked):
            if self._resting[index] > 0 or asked.total < self._needed[index]:
                continue
            if self.value(index) < 0.0:
                self._resting[index] = self._next_rest[index]
                self._next_rest[index] = min(2 * self._next_rest[index], LONGEST_REST)
                self._needed[index] = RETRIAL
                # Mostly forgotten, so that the next trial speaks for itself.
                asked.total = asked.hits = 0.0
                self._agreed[index].fade(0.25)
            else:
                self._next_rest[index] = max(REST, self._next_rest[index] // 2)
        self.cap = self._best_cap()

    def _best_cap(self) -> int:
        total = sum(tally.total for tally in self._agreed)
        if total < TRIAL:
            return self._max_pending
        a = (sum(tally.hits for tally in self._agreed) + 1.0) / (total + 1.0)
        draft = self._segments[0].alone + self._read_seconds[0]
        deep = sum(segment.alone for segment in self._segments)
        rider = sum(segment.slope for segment in self._segments[1:])

        def rate(d: int) -> float:
            tokens = d + 1.0 if a > 0.9999 else (1.0 - a ** (d + 1)) / (1.0 - a)
            return tokens / (d * (draft + rider) + deep)

        return max(range(1, self._max_pending + 1), key=rate)
