"""Whether a request's deadline can be met here, by the cost model and the queue, before it waits.

A request that would be late in any case only makes others late: it is refused at once with the
least time that could be, so that its client can ask for that, or ask elsewhere. What is predicted
is corrected by what became of earlier predictions (`deliberate.policies.time_bounds`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from deliberate.policies.lengths import LengthPredictor
from deliberate.policies.time_bounds import TimeBounds
from deliberate.serving.errors import ApiError
from deliberate.serving.pace import Pace
from deliberate.utils.errors import DeliberateError

# Weight of the newest answer in a mean.
_NEWEST = 0.1
# Seconds for which a refusal keeps requests with longer deadlines from taking its room.
_STARVED = 1.0
# Requests whose deadlines are counted before the counts are halved.
_KINDS = 256


class Starved(NamedTuple):
    """A request that was refused for want of room: its prompt and limit in tokens, the seconds of
    its deadline, and when."""

    prompt: int
    limit: int
    allowed: float
    at: float


class Asked(NamedTuple):
    """What a prediction was made from: tokens of the prompt and of the answer, the requests that
    were here, and the seconds until a place is free."""

    prompt: int
    tokens: int
    load: int
    wait: float


class Admission:
    """Predicts when a request would be finished.

    How long an answer will be is taken from earlier answers; before there are enough of them only
    what is certain counts, the prompt and one token. Of requests with like deadlines the share
    `in_time` of those that are taken is to be in time.

    Args:
        pace: called for how fast the server decodes at present.
        max_running: requests that are decoded at a time.
        share: of such answers whose length is planned for; in (0, 1).
        overhead: seconds of HTTP and of handing over for each request, until they were measured.
        in_time: see above; in (0, 1). By default more than the 95 % that are due: what the first
            answers of a burst teach comes after them.
        clock: seconds, that of arrivals.

    Raises:
        DeliberateError: a share that is not allowed.
    """

    def __init__(
        self,
        pace: Callable[[], Pace],
        max_running: int,
        *,
        share: float = 0.5,
        overhead: float = 0.001,
        in_time: float = 0.965,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0.0 < share < 1.0:
            raise DeliberateError(f"admission share {share} is outside (0, 1)")
        self._pace = pace
        self._max_running = max_running
        self._share = share
        self._overhead = self._least_overhead = overhead
        self._measured = False
        self._lengths = LengthPredictor()
        self._by_limit: dict[int, LengthPredictor] = {}
        self._bounds = TimeBounds(in_time)
        self._whole: float | None = None
        self._dues: dict[int, float] = {}
        self._next = 0
        self._clock = clock
        self._tightest: Starved | None = None
        self._kinds: Counter[float] = Counter()  # deadlines of the newest requests

    # -- what is known ---------------------------------------------------------------------------

    @property
    def overhead(self) -> float:
        """Seconds of a request outside the engine: the mean of the newest answers."""
        return self._overhead

    def note_answer(
        self, tokens: int, seconds: float, overhead: float | None = None, limit: int | None = None
    ) -> None:
        """An answer has ended.

        Args:
            tokens: of it.
            seconds: from its first token's request to its end.
            overhead: those of them outside the engine; None where that is not known.
            limit: tokens that it might have had; None where that is not known.
        """
        if overhead is not None:
            first, self._measured = not self._measured, True
            self._overhead += (1.0 if first else _NEWEST) * (overhead - self._overhead)
            # What an idle server takes: a burst may hide it for a while, but not raise it.
            grown = self._least_overhead + 0.01 * (overhead - self._least_overhead)
            self._least_overhead = overhead if first else min(overhead, grown)
        if tokens:
            self._lengths.observe(tokens)
            if limit is not None:
                self._by_limit.setdefault(limit.bit_length(), LengthPredictor()).observe(tokens)
        self._whole = (
            seconds if self._whole is None else self._whole + _NEWEST * (seconds - self._whole)
        )

    def _note(self, allowed: float, asked: Asked, arrival: float, load: int) -> None:
        """The answer of a request with a deadline was sent. It is noted at the load that it has
        met, not at that which it was taken at: many may have come since, as at the beginning of a
        burst."""
        now = self._clock()
        running = min(load, self._max_running)
        own = self._seconds(asked.prompt, asked.tokens, running, self._overhead)
        if own is not None:
            self._bounds.note(allowed, load, asked.wait + own, now - arrival, now)

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a place in a full queue can be expected."""
        return max(1, math.ceil((self._whole or 0.0) / self._max_running))

    # -- requests --------------------------------------------------------------------------------

    def enter(
        self, prompt: int, limit: int, choices: int, deadline_ms: float | None, arrival: float
    ) -> Place:
        """Takes a request, or refuses it; what is returned must be ended with it.

        Args:
            prompt: tokens of it.
            limit: most tokens of an answer.
            choices: answers.
            deadline_ms: milliseconds from `arrival`; None for none.
            arrival: second.

        Raises:
            ApiError: 400 where the deadline cannot be met by an idle server, 429 where it cannot
                be met now. Both say the least that could be.
        """
        place = self.check(prompt, limit, choices, deadline_ms, arrival)
        number, self._next = self._next, self._next + 1
        self._dues[number] = place.due
        place._release = lambda: self._dues.pop(number, None)
        return place

    def check(
        self, prompt: int, limit: int, choices: int, deadline_ms: float | None, arrival: float
    ) -> Place:
        """As `enter`, of a request that is not taken yet: its place needs no end."""
        allowed = None if deadline_ms is None else deadline_ms / 1000
        due = math.inf if allowed is None else arrival + allowed
        tokens = self._expected(limit)
        here = len(self._dues)
        now = self._seconds(prompt, tokens, min(here + choices, self._max_running), self._overhead)
        if now is None:
            return Place(self, allowed, arrival, due)
        if allowed is not None:
            self._kinds[allowed] += 1
            if self._kinds.total() > _KINDS:
                self._kinds = Counter({one: n // 2 for one, n in self._kinds.items() if n > 1})
        wait = self._wait(due, choices)
        predicted = wait + now
        second = self._clock()
        # An idle server takes what it can do: whoever may come later is no reason against it.
        factor = 1.0
        if allowed is not None and here:
            factor = self._bounds.factor(allowed, here + choices, second)
        # What it has spent already beyond what requests spend outside the engine.
        spent = max(0.0, second - arrival - self._overhead)
        bound = factor * predicted + spent
        if allowed is not None and bound > allowed:
            self._tightest = Starved(prompt, limit, allowed, second)
            least = self._seconds(
                prompt, tokens, min(choices, self._max_running), self._least_overhead
            )
            assert least is not None
            self._refuse(prompt, tokens, allowed, least, bound)
        if allowed is not None and self._starves(allowed, here, second):
            raise ApiError(
                429,
                f"deadline_ms={1000 * allowed:g}: with {here} requests here shorter deadlines are "
                "being refused: try again later",
                "overloaded_error",
                retry_after=1,
            )
        # Of what was predicted before lengths were known nothing is to be learnt.
        asked = Asked(prompt, tokens, here + choices, wait) if self._lengths.knows(0) else None
        place = Place(self, allowed, arrival, due, asked)
        each = self._pace().token_seconds(min(here + choices, self._max_running))
        # Where answers are faster than is predicted, those that were taken for it are not given up.
        place.begin_by = due - min(1.0, factor) * (tokens - 1) * (each or 0.0)
        return place

    def _starves(self, allowed: float, here: int, now: float) -> bool:
        """Whether a request would take the room of others whose deadlines are shorter.

        In an overload those would be refused, and these, which take longer, would not: the fewest
        requests would be answered. Where a quarter of the places is taken, the newest refused
        request of a shorter deadline must have found room, too, if there are more of its kind.
        """
        other = self._tightest
        if other is None or now - other.at > _STARVED or here < self._max_running / 4:
            return False
        if allowed <= 2 * other.allowed or self._kinds[other.allowed] < 2 * self._kinds[allowed]:
            return False
        tokens, running = self._expected(other.limit), min(here + 1, self._max_running)
        own = self._seconds(other.prompt, tokens, running, self._overhead)
        factor = self._bounds.factor(other.allowed, here + 1, now)
        wait = self._wait(now + other.allowed, 1)
        return own is not None and factor * (wait + own) > other.allowed

    def _refuse(self, prompt: int, tokens: int, allowed: float, least: float, bound: float) -> None:
        wanted = f"deadline_ms={1000 * allowed:g}"
        if least > allowed:
            # One token: it was not tokenized yet, and even the shortest would be late.
            beside = f"a prompt of {prompt}" if prompt > 1 else "the shortest prompt"
            raise ApiError(
                400,
                f"{wanted}: the least that could be here is {_ms(least)} ms, for {beside} and an "
                f"answer of {tokens} tokens: allow that, or ask for fewer tokens",
                "deadline_error",
            )
        raise ApiError(
            429,
            f"{wanted}: with {len(self._dues)} requests here {_ms(bound)} ms can be kept to, on an "
            f"idle server {_ms(least)}: try again later",
            "overloaded_error",
            retry_after=max(1, math.ceil(bound - allowed)),
        )

    def _expected(self, limit: int) -> int:
        """Tokens of an answer: what clients allow says something about what they ask for, so those
        with a limit within a factor of two speak for it, and all where they are too few."""
        like = self._by_limit.get(limit.bit_length())
        known = like if like is not None and like.knows(0) else self._lengths
        return known.quantile(0, limit, self._share) if known.knows(0) else 1

    def _seconds(self, prompt: int, tokens: int, running: int, overhead: float) -> float | None:
        """Of an answer while so many are decoded, without waiting; None while nothing is known."""
        pace = self._pace()
        first, each = pace.prompt_seconds(prompt), pace.token_seconds(running)
        if first is None or each is None:
            return None
        return overhead + first + (tokens - 1) * each

    def _wait(self, due: float, choices: int) -> float:
        """Until a place is free, in the order of deadlines."""
        ahead = len(self._dues) + choices - self._max_running
        if ahead <= 0 or self._whole is None:
            return 0.0
        # Those that run keep their places; of those that wait, the more urgent ones go first.
        urgent = sum(one <= due for one in self._dues.values())
        return min(ahead, max(1, urgent - self._max_running + 1)) * self._whole / self._max_running


class Place:
    """A request that was taken; ending twice is as ending once.

    Attributes:
        due: second of its deadline; infinite without one.
        begin_by: second after which the rest of such an answer, once begun, would be late.
    """

    def __init__(
        self,
        admission: Admission,
        allowed: float | None,
        arrival: float,
        due: float,
        asked: Asked | None = None,
    ) -> None:
        self.due = self.begin_by = due
        self._admission = admission
        self._allowed, self._arrival = allowed, arrival
        self._asked = asked
        self._release: Callable[[], object] | None = None
        self._met: int | None = None  # requests that were here at its end

    def end(self, *, finished: bool = False) -> None:
        """It has ended.

        Args:
            finished: with its whole answer, so that the time until it is sent says something.
        """
        release, self._release = self._release, None
        if release is None:
            return
        if finished and self._asked is not None:
            self._met = max(self._asked.load, len(self._admission._dues))
        release()

    def sent(self) -> None:
        """All of its answer was handed to the connection: only now it is in time, or late."""
        met, self._met = self._met, None
        if met is not None and self._allowed is not None and self._asked is not None:
            self._admission._note(self._allowed, self._asked, self._arrival, met)


def _ms(seconds: float) -> str:
    return f"{math.ceil(1e4 * seconds) / 10:g}"
