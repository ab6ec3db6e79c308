"""Whether a request's deadline can be met here, by the cost model and the queue, before it waits.

A request that would be late in any case only makes others late: it is refused at once with the
least time that could be, so that its client can ask for that, or ask elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from deliberate.policies.lengths import LengthPredictor
from deliberate.serving.errors import ApiError
from deliberate.serving.pace import Pace
from deliberate.utils.errors import DeliberateError


class Admission:
    """Predicts when a request would be finished.

    How long an answer will be is taken from earlier answers; before there are enough of them only
    what is certain counts, the prompt and one token.

    Args:
        pace: called for how fast the server decodes at present.
        max_running: requests that are decoded at a time.
        share: of such answers that must be in time for a deadline to be taken; in (0, 1).
        overhead: seconds of HTTP and of handing over for each request, until they were measured.

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
    ) -> None:
        if not 0.0 < share < 1.0:
            raise DeliberateError(f"admission share {share} is outside (0, 1)")
        self._pace = pace
        self._max_running = max_running
        self._share = share
        self._overhead, self._measured = overhead, False
        self._lengths = LengthPredictor()
        self._whole: float | None = None
        self._dues: dict[int, float] = {}
        self._next = 0

    # -- what is known ---------------------------------------------------------------------------

    @property
    def overhead(self) -> float:
        """Seconds of a request outside the engine: the mean of the newest answers."""
        return self._overhead

    def note_answer(self, tokens: int, seconds: float, overhead: float | None = None) -> None:
        """An answer has ended.

        Args:
            tokens: of it.
            seconds: from its first token's request to its end.
            overhead: those of them outside the engine; None where that is not known.
        """
        if overhead is not None:
            first, self._measured = not self._measured, True
            self._overhead += (1.0 if first else 0.1) * (overhead - self._overhead)
        if tokens:
            self._lengths.observe(tokens)
        self._whole = (
            seconds if self._whole is None else self._whole + 0.1 * (seconds - self._whole)
        )

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a place in a full queue can be expected."""
        return max(1, math.ceil((self._whole or 0.0) / self._max_running))

    # -- requests --------------------------------------------------------------------------------

    def enter(
        self, prompt: int, limit: int, choices: int, deadline_ms: float | None, arrival: float
    ) -> Callable[[], None]:
        """Takes a request, or refuses it; returns what is called at its end.

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
        due = math.inf
        if deadline_ms is not None:
            due = arrival + deadline_ms / 1000
            self._check(prompt, limit, choices, deadline_ms, due)
        number, self._next = self._next, self._next + 1
        self._dues[number] = due

        def release() -> None:
            self._dues.pop(number, None)

        return release

    def _check(self, prompt: int, limit: int, choices: int, deadline_ms: float, due: float) -> None:
        allowed = deadline_ms / 1000
        tokens = self._expected(limit)
        least = self._seconds(prompt, tokens, min(choices, self._max_running))
        if least is None:
            return
        if least > allowed:
            raise ApiError(
                400,
                f"deadline_ms={deadline_ms:g}: the least that could be here is {_ms(least)} ms, "
                f"for a prompt of {prompt} and an answer of {tokens} tokens: allow that, or ask "
                "for fewer tokens",
                "deadline_error",
            )
        now = self._seconds(prompt, tokens, min(len(self._dues) + choices, self._max_running))
        wait = self._wait(due, choices)
        if now is not None and wait + now > allowed:
            raise ApiError(
                429,
                f"deadline_ms={deadline_ms:g}: with {len(self._dues)} requests here the least "
                f"that could be is {_ms(wait + now)} ms, on an idle server {_ms(least)}: try again "
                "later",
                "overloaded_error",
                retry_after=max(1, math.ceil(wait + now - allowed)),
            )

    def _expected(self, limit: int) -> int:
        if not self._lengths.knows(0):
            return 1
        return self._lengths.quantile(0, limit, self._share)

    def _seconds(self, prompt: int, tokens: int, running: int) -> float | None:
        """Of an answer while so many are decoded, without waiting; None while nothing is known."""
        pace = self._pace()
        first, each = pace.prompt_seconds(prompt), pace.token_seconds(running)
        if first is None or each is None:
            return None
        return self._overhead + first + (tokens - 1) * each

    def _wait(self, due: float, choices: int) -> float:
        """Until a place is free, in the order of deadlines."""
        ahead = len(self._dues) + choices - self._max_running
        if ahead <= 0 or self._whole is None:
            return 0.0
        # Those that run keep their places; of those that wait, the more urgent ones go first.
        urgent = sum(one <= due for one in self._dues.values())
        return min(ahead, max(1, urgent - self._max_running + 1)) * self._whole / self._max_running


def _ms(seconds: float) -> str:
    return f"{math.ceil(1e4 * seconds) / 10:g}"
