"""Which exits to evaluate and how far to draft in exact mode, decided online from measured times.

A rejected draft costs time, and so does evaluating an exit at which no token exits. The planner
keeps running estimates of how often tokens exit at each exit, how often full depth agrees, and how
long passes take on this machine; from these it computes the seconds that evaluating an exit saves.
An exit that loses time is disabled for n steps, for twice as many each time, and is then tried
again. The number of pending tokens is capped where DEL's objective (arXiv:2504.05598), in measured
seconds, is largest: the expected number of tokens of a round, (1 - a^(d+1)) / (1 - a), over its
time d l + L.

Beyond that, seconds per verified token with drafting are compared with those of full-depth passes.
Where drafting is slower, all exits are disabled.

The output does not depend on the planner, only the time does; so timings may steer exact mode, and
no other.
"""

from __future__ import annotations

import functools
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.config import MAX_CALL_STEPS

# Observations after which older ones have lost half of their weight.
MEMORY = 128
# Evaluations of an exit before its value counts: of a new exit, and of one that is tried again.
TRIAL, RETRIAL = 12, 6
# Full-depth passes before anything is drafted, to measure what full depth costs.
FIRST_FULL = 4
# Full-depth passes that measure it again later.
PROBE_PASSES = 2
# Verified tokens of a sequence after which drafting is compared with full-depth passes.
ROUND = 16
# Where sequences share passes: drafting that takes this many times as long as full depth is
# disabled at once, and what is slower by less after so many times as many tokens.
CLEARLY, SURE_ROUNDS = 1.15, 3
# Verified tokens of a sequence after which full-depth passes are timed again.
REFRESH = 256
# Steps for which an exit is disabled, at first and at most.
DISABLED, LONGEST_DISABLED = 32, 1024


@dataclass
class _Tally:
    """A rate of hits; old observations fade."""

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


class _Rounds:
    """Seconds per verified token of the latest rounds of drafts.

    Args:
        rows: sequences that share a round, about.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._seconds: deque[float] = deque()
        self._tokens: deque[int] = deque()
        self.tokens = 0

    def add(self, seconds: float, tokens: int) -> None:
        if self.tokens and seconds >= 8.0 * self.each * (tokens + 1):
            return  # an interruption
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        self.tokens += tokens
        while self.tokens > 2 * MEMORY * self._rows:
            self._seconds.popleft()
            self.tokens -= self._tokens.popleft()

    @property
    def each(self) -> float:
        if not self.tokens:
            return 0.0
        seconds = sum(self._seconds)
        if self._rows > 1:
            # Rounds of many are alike: what is far longer than the others was interrupted, too.
            most = 2.0 * statistics.median(self._seconds)
            seconds = sum(min(one, most) for one in self._seconds)
        return seconds / self.tokens


@dataclass
class _Line:
    """Least squares of seconds against tokens of a pass; old observations fade."""

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
    def width(self) -> float:
        """Rows of a pass, on average; 1 before the first."""
        return self.rows / self.n if self.n else 1.0

    @property
    def fixed(self) -> float:
        """Seconds per row of a pass that do not depend on its tokens."""
        if self.n == 0:
            return 0.0
        return max(0.0, self.y / self.n - self.slope * self.x / self.n) / self.width

    @property
    def alone(self) -> float:
        """Seconds per row of a pass with one token of each."""
        return self.fixed + self.slope if self.n else 0.0


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that holds the planner's lock: several threads may decode with one planner."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class DraftPlanner:
    """Running estimates of one model's exits; lives as long as the model, over generations.

    Generations of several threads share it, and it learns from all of them.

    Args:
        exits: how many.
        max_pending: most tokens of a sequence that may be pending.
        read_seconds: of evaluating each exit once.
        probe_passes: full-depth passes that measure their time again; as many as the executor runs
            in one call, or the cost of a call would count in full for each.
        rows: sequences that share its passes, about.

    Attributes:
        cap: tokens of a sequence that may be pending now.
    """

    def __init__(
        self,
        exits: int,
        max_pending: int,
        read_seconds: Sequence[float],
        *,
        probe_passes: int = PROBE_PASSES,
        rows: int = 1,
    ) -> None:
        self._lock = threading.RLock()
        self._probe_passes = probe_passes
        self._rows = rows
        self._loads: dict[int, DraftPlanner] = {}
        self._drafted = False
        self._read_seconds = tuple(read_seconds)
        self._handling = [0.0] * exits
        self._max_pending = max_pending
        self._exited = [_Tally() for _ in range(exits)]
        self._agreed = [_Tally() for _ in range(exits)]
        self._segments = [_Line() for _ in range(exits + 1)]
        self._lost = _Tally()
        self._disabled = [max(FIRST_FULL, probe_passes)] * exits
        self._drafting = _Rounds(rows)
        # Seconds per token of the latest full-depth passes; the median counts, since the first ones
        # are slow.
        self._full: deque[float] = deque(maxlen=9)
        self._since_full = 0
        self._next_all_disabled = DISABLED
        self._unsettled = 0.0
        self._next_disabled = [DISABLED] * exits
        self._needed = [TRIAL] * exits
        self.cap = max_pending

    def of_load(self, rows: int) -> DraftPlanner:
        """The planner of steps that so many sequences share: what a token costs depends on that.

        There is one up to each power of two, with estimates of its own.
        """
        load = (rows - 1).bit_length()
        planner = self._loads.get(load)
        if planner is None:
            with self._lock:
                planner = self._loads.setdefault(
                    load,
                    DraftPlanner(
                        len(self._exited),
                        self._max_pending,
                        self._read_seconds,
                        probe_passes=2 * PROBE_PASSES if load else MAX_CALL_STEPS,
                        rows=1 << load,
                    ),
                )
        return planner

    def is_enabled(self, exit_index: int) -> bool:
        """Whether this exit is worth evaluating now."""
        return self._disabled[exit_index] <= 0

    @property
    def disabled_tokens(self) -> int:
        """Steps before any exit is evaluated again; 0 where one is enabled now."""
        return min(self._disabled)

    def read_seconds(self, exit_index: int) -> float:
        """Seconds of evaluating an exit once."""
        return self._read_seconds[exit_index]

    @_locked
    def token_fed(self, tokens: int = 1) -> None:
        """So many more tokens of each sequence were fed to the first segment."""
        for index, left in enumerate(self._disabled):
            if left > 0:
                self._disabled[index] = max(0, left - tokens)

    @_locked
    def progress(self, seconds: float, tokens: int) -> None:
        """One step of the loop took `seconds` and verified `tokens` tokens."""
        self._unsettled += seconds
        if tokens <= 0:
            return
        drafting = self.disabled_tokens == 0
        seconds, self._unsettled = self._unsettled, 0.0
        drafted, self._drafted = self._drafted, drafting
        if not drafting:
            if drafted and self._rows > 1:
                return  # what the others had drafted was verified in it
            self._full.append(seconds / tokens)
            return
        self._since_full += tokens
        if not drafted and self._rows > 1:
            return  # drafts of sequences that it did not serve are in its time, not in its tokens
        self._drafting.add(seconds, tokens)
        self._compare()

    def _compare(self) -> None:
        drafted = self._drafting
        if drafted.tokens < ROUND * self._rows or not self._full:
            return
        ratio = drafted.each / statistics.median(self._full)
        # A trial of many sequences costs many tokens, so it is repeated less often, and a small
        # difference, which may be noise, is measured for longer.
        alone = self._rows == 1
        sure = alone or ratio > CLEARLY or drafted.tokens >= SURE_ROUNDS * ROUND * self._rows
        if ratio > 1.0 and sure:
            self._disable_all(self._next_all_disabled)
            longer, longest = (2, LONGEST_DISABLED) if alone else (4, LONGEST_DISABLED // 2)
            self._next_all_disabled = min(longer * self._next_all_disabled, longest)
            self._drafting = _Rounds(self._rows)
        elif self._since_full >= REFRESH * self._rows:
            # The machine may have changed: full-depth passes are timed again.
            self._next_all_disabled = max(DISABLED, self._next_all_disabled // 2)
            self._disable_all(self._probe_passes)

    def _disable_all(self, steps: int) -> None:
        """Disables all exits for this many steps."""
        self._disabled = [max(left, steps) for left in self._disabled]
        self._since_full = 0

    @_locked
    def segment(self, index: int, rows: int, tokens: int, seconds: float, passes: int = 1) -> None:
        """Each of so many passes of a segment took `seconds`, the exit head above it not
        included."""
        for _ in range(passes):
            self._segments[index].add(rows, tokens, seconds)

    @_locked
    def handled(self, exit_index: int, rows: int, seconds: float) -> None:
        """Between two segments of one pass an exit was evaluated for `rows` sequences: what that
        took, with all that is done because the pass stops there."""
        before, share = self._handling[exit_index], seconds / rows
        if not before or share < 8.0 * before:  # else an interruption
            self._handling[exit_index] = share if not before else before + (share - before) / 8

    @_locked
    def evaluated(self, exit_index: int, exited: bool, times: int = 1) -> None:
        """An exit was evaluated, and the token, or each of so many, exited there or not."""
        for _ in range(times):
            self._exited[exit_index].add(exited)

    @_locked
    def verified(self, exit_index: int, agreed: bool, discarded: int = 0) -> None:
        """Full depth accepted a draft, or rejected it together with `discarded` later tokens."""
        self._agreed[exit_index].add(agreed)
        if not agreed:
            self._lost.total += 1.0
            self._lost.hits += discarded
            if self._lost.total > MEMORY:
                self._lost.fade(0.5)

    def value(self, exit_index: int) -> float:
        """Seconds that evaluating this exit saves on average, negative where it loses."""
        above = self._segments[exit_index + 1 :]
        exits = self._exited[exit_index].rate()
        saved = sum(segment.fixed for segment in above)
        if exit_index:
            # Sequences meet at the first exit and go on in one pass when enough of them are
            # blocked, so each that exits there makes passes fewer. The pass above a later exit is
            # run for those that stay, and is spared only where nobody does.
            others = self._segments[exit_index].width - 1.0
            saved *= exits**others
        shallow = self._segments[0].alone + self._read_seconds[0]
        lost = self._lost.rate(1.0, 1.0) * shallow
        agrees = self._agreed[exit_index].rate(2.0, 2.0)
        gain = exits * (agrees * saved - (1.0 - agrees) * lost)
        return gain - max(self._read_seconds[exit_index], self._handling[exit_index])

    @_locked
    def review(self) -> None:
        """After a deep pass: disables the exits that lose time, and sets the cap."""
        if any(segment.n == 0 for segment in self._segments):
            return
        for index, exited in enumerate(self._exited):
            if self._disabled[index] > 0 or exited.total < self._needed[index]:
                continue
            if self.value(index) < 0.0:
                self._disabled[index] = self._next_disabled[index]
                self._next_disabled[index] = min(2 * self._next_disabled[index], LONGEST_DISABLED)
                self._needed[index] = RETRIAL
                # Mostly dropped, so that the next trial decides by its own observations.
                exited.total = exited.hits = 0.0
                self._agreed[index].fade(0.25)
            else:
                self._next_disabled[index] = max(DISABLED, self._next_disabled[index] // 2)
        self.cap = self._best_cap()

    def _best_cap(self) -> int:
        total = sum(tally.total for tally in self._agreed)
        if total < TRIAL:
            return self._max_pending
        a = (sum(tally.hits for tally in self._agreed) + 1.0) / (total + 1.0)
        draft = self._segments[0].alone + self._read_seconds[0]
        deep = sum(segment.alone for segment in self._segments)
        deferred = sum(segment.slope for segment in self._segments[1:])

        def rate(d: int) -> float:
            tokens = d + 1.0 if a > 0.9999 else (1.0 - a ** (d + 1)) / (1.0 - a)
            return tokens / (d * (draft + deferred) + deep)

        return max(range(1, self._max_pending + 1), key=rate)
