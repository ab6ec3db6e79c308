"""One answer while it is computed, read by any number of clients.

Each reader gets all of it from the beginning, whenever it joins. When the last reader has gone the
computation is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deliberate.serving.answers import Choice
from deliberate.serving.errors import ApiError
from deliberate.serving.text import TokenText


@dataclass(frozen=True)
class Piece:
    """Some more text of one choice.

    Attributes:
        index: of the choice.
        text: may be empty.
        finish: in the last piece of the choice.
        tokens: the text token by token, with depths; none where those are not known.
        reasoning: text of the reasoning, which comes before `text`.
    """

    index: int
    text: str
    finish: str | None = None
    tokens: Sequence[TokenText] = ()
    reasoning: str = ""


class Source(Protocol):
    """One choice while it is computed (`deliberate.serving.answer_stream.AnswerStream`)."""

    index: int
    done: bool
    finish: str

    async def more(self) -> list[TokenText]:
        """The text of the next part, token by token."""
        ...

    def choice(self) -> Choice:
        """What it has come to."""
        ...

    def close(self) -> None:
        """Nobody reads it any more."""
        ...


class Flight:
    """An answer on its way.

    Args:
        sources: its choices; none for an answer that is there already.
        choices: of such an answer.
        ended: called once, when it has ended in whatever way.

    Attributes:
        pieces: of all choices so far, in the order in which they came.
        choices: once it has ended well.
        error: why it has not.
        done: nothing follows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        choices: Sequence[Choice] = (),
        ended: Callable[[Flight], None] = lambda _: None,
    ) -> None:
        self.pieces = [
            Piece(one.index, one.text, one.finish, reasoning=one.reasoning or "") for one in choices
        ]
        self.choices = list(choices)
        self.error: ApiError | None = None
        self.done = not sources
        self._sources = list(sources)
        self._ended = ended
        self._begun = {one.index for one in choices}
        self._readers = 0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._run()) if sources else None

    def reader(self) -> Reader:
        """Reads it from the beginning; must be closed."""
        self._readers += 1
        return Reader(self)

    def release(self) -> None:
        """A reader has gone."""
        self._readers -= 1
        if self._readers == 0 and not self.done:
            self._end(ApiError(499, "nobody reads this answer any more"))

    @property
    def begun(self) -> bool:
        """Whether every choice has a piece, or none will come."""
        return self.done or len(self._begun) == len(self._sources)

    async def changed(self) -> None:
        """Returns at the next piece, or at the end."""
        await self._changed.wait()

    async def _run(self) -> None:
        pumps = [asyncio.create_task(self._pump(source)) for source in self._sources]
        error: ApiError | None = None
        try:
            await asyncio.gather(*pumps)
        except ApiError as one:
            error = one
        except Exception as one:  # of this server's own: the readers must hear of it
            error = ApiError(500, f"the answer failed: {type(one).__name__}", "internal_error")
            raise
        finally:
            for pump in pumps:
                pump.cancel()
            self._end(error)

    async def _pump(self, source: Source) -> None:
        while not source.done:
            tokens = await source.more()
            text = "".join(one.text for one in tokens if not one.reasoning)
            reasoning = "".join(one.text for one in tokens if one.reasoning)
            finish = source.finish if source.done else None
            self.pieces.append(Piece(source.index, text, finish, tokens, reasoning))
            self._begun.add(source.index)
            self._wake()

    def _end(self, error: ApiError | None) -> None:
        if self.done:
            return
        self.done, self.error = True, error
        if error is None and all(source.done for source in self._sources):
            self.choices = [source.choice() for source in self._sources]
        elif error is None:
            self.error = ApiError(503, "the server is going down: try another", "overloaded_error")
        for source in self._sources:
            source.close()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._wake()
        ended, self._ended = self._ended, lambda _: None  # it holds the version
        ended(self)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Reader:
    """One client's way through an answer."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._next = 0
        self._closed = False

    async def begin(self) -> None:
        """Waits for the first piece of every choice.

        Raises:
            ApiError: the answer failed.
        """
        while not self._flight.begun:
            await self._flight.changed()
        self._check()

    async def ready(self) -> list[Piece]:
        """All pieces that have come since the last call, at least one; none at the end.

        Raises:
            ApiError: the answer failed.
        """
        flight = self._flight
        while self._next == len(flight.pieces):
            if flight.done:
                self._check()
                return []
            await flight.changed()
        found = flight.pieces[self._next :]
        self._next += len(found)
        return found

    async def whole(self) -> list[Choice]:
        """All choices, once they are complete.

        Raises:
            ApiError: the answer failed.
        """
        while not self._flight.done:
            await self._flight.changed()
        self._check()
        return self._flight.choices

    def close(self) -> None:
        """It reads no more; once is enough."""
        if not self._closed:
            self._closed = True
            self._flight.release()

    def _check(self) -> None:
        if self._flight.error is not None:
            raise self._flight.error
