"""What the engine's thread hands to the coroutines that read answers, and how."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deliberate.engine.logprobs import TokenLogprobs
from deliberate.engine.request import Request
from deliberate.policies.controller_settings import BudgetReport
from deliberate.trace import GenerationTrace


@dataclass(frozen=True)
class Part:
    """What a request has got from one step.

    Attributes:
        tokens: accepted since the last part.
        finished: "stop", "length" or "abort" in the last part.
        trace: of the whole answer, in the last part.
        exit_layers: layer after which each of the tokens was chosen.
        budget: in the last part, how the answer stood to its latency budget.
        logprobs: of the tokens, where the request asked for them, else empty.
        at: second of the engine's clock at which its step had ended.
    """

    tokens: list[int]
    finished: str | None = None
    trace: GenerationTrace | None = None
    exit_layers: list[int] = field(default_factory=list)
    budget: BudgetReport | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    at: float = math.nan


class Ticket:
    """One request on its way: where its parts go, and whether anybody still reads them."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.parts: asyncio.Queue[Part | Exception] = asyncio.Queue()
        self.number: int | None = None
        self.gone = False
        self.opened = self.entered = time.perf_counter()
        self.loop = loop

    def put(self, part: Part | Exception) -> None:
        """From any thread; a client whose loop has ended gets nothing."""
        hand_over([(self, part)])


def hand_over(parts: Sequence[tuple[Ticket, Part | Exception]]) -> None:
    """Gives the parts of a step to their readers, with one call for each loop.

    A call wakes the loop's thread, which then competes with the engine's for the interpreter.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Part | Exception]]] = {}
    for one in parts:
        by_loop.setdefault(one[0].loop, []).append(one)

    def spread(own: list[tuple[Ticket, Part | Exception]]) -> None:
        for ticket, part in own:
            ticket.parts.put_nowait(part)

    for loop, own in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(spread, own)


class PartStream:
    """The parts of one request, as its tokens are accepted.

    Closing it takes no waiting, so that it can be done by a task that is being cancelled.
    """

    def __init__(self, ticket: Ticket, retire: Callable[[Ticket], None]) -> None:
        self._ticket = ticket
        self._retire: Callable[[Ticket], None] | None = retire
        self._error: Exception | None = None

    @property
    def entered(self) -> float:
        """Second at which the engine took the request; at first that at which it was handed in."""
        return self._ticket.entered

    @property
    def silent(self) -> bool:
        """Whether nothing has come that was not read."""
        return self._ticket.parts.empty()

    async def next(self) -> Part:
        """The next part; none follows one that is finished.

        Raises:
            EngineFailed: a step failed.
            DeliberateError: the engine cannot do what the request asks for.
        """
        return (await self._take(1))[0]

    async def ready(self) -> list[Part]:
        """All parts that have come, at least one: a reader that falls behind catches up at once.

        Raises:
            EngineFailed, DeliberateError: as `next`, after the parts before it.
        """
        return await self._take(None)

    async def _take(self, most: int | None) -> list[Part]:
        parts, made = self._ticket.parts, list[Part]()
        while self._error is None and (not made or (len(made) != most and not parts.empty())):
            part = parts.get_nowait() if not parts.empty() else await parts.get()
            if isinstance(part, Exception):
                self._error = part
            else:
                made.append(part)
        if not made:
            # It holds frames, and they this stream, once it was raised.
            error, self._error = self._error, None
            assert error is not None
            raise error
        return made

    def put(self, part: Part | Exception) -> None:
        """Ends it as the engine would; in the loop that reads it."""
        self._ticket.parts.put_nowait(part)

    def close(self) -> None:
        """The request has ended, or nobody reads it any more: it is given up."""
        # What still holds this stream must not hold the service, and its version, any longer.
        retire, self._retire = self._retire, None
        if retire is not None and not self._ticket.gone:
            retire(self._ticket)
