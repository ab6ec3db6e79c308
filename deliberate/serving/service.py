"""The engine in a thread of its own, and what carries its tokens to the clients.

One thread steps the engine while there is work; coroutines hand requests in and read their tokens
from a queue each. A step that fails ends the request that made it fail
(`deliberate.serving.isolation`); where nothing can be decoded any more the service calls itself
dead and `/health` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from deliberate.engine.admitted import EngineStats, StepOutput
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.serving.isolation import EngineBroken, Isolation
from deliberate.serving.parts import Part, PartStream, Ticket, hand_over
from deliberate.trace import GenerationTrace
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)
# Seconds after which a thread without work checks again, should a signal have been missed.
_IDLE = 1.0
# Before its first step has ended an engine gets so many times the limit of a step: kernels are
# compiled, and graphs captured, on first use.
_FIRST_STEPS = 10
# Seconds that `stop` waits for the step that runs.
_LAST_STEP = 10.0


class QueueFull(DeliberateError):
    """As many requests wait as may."""


class EngineFailed(DeliberateError):
    """The engine could not decode a request."""


class EngineDown(EngineFailed):
    """No request is decoded at present: the engine has failed, or hangs in a step."""


class EngineService:
    """Requests of many coroutines on one engine.

    Only the engine's thread touches the engine, whose lock is held for whole steps: coroutines
    leave their requests in an inbox and never wait for a step.

    Args:
        engine: that nothing else steps.
        max_unfinished: requests that may wait or run; a further one is refused.
        on_step: called in the engine's thread after each step with its outputs and seconds.
        on_end: called in the engine's thread with each request that ended by itself, its trace
            (None where it failed), and the seconds since it was handed in.
        step_limit: seconds after which a step counts as hung; ten times that for the first.
        clock: seconds, monotonic.

    Attributes:
        failure: why the engine decodes nothing any more; None while it does.
        stopped: `stop` was called: that its thread does not run is no fault.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_unfinished: int = 272,
        on_step: Callable[[list[StepOutput], float], None] | None = None,
        on_end: Callable[[Request, GenerationTrace | None, float], None] = lambda *_: None,
        step_limit: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.max_unfinished = max_unfinished
        self.failure: str | None = None
        self.stats = engine.stats()
        self._engine = engine
        self._on_step = on_step
        self._on_end = on_end
        self._inbox: list[Ticket] = []
        self._left: list[Ticket] = []
        self._tickets: dict[int, Ticket] = {}
        self._isolation = Isolation(engine, self._deliver, self._step)
        self._step_limit = step_limit
        self._clock = clock
        # When the engine's thread last began something; None while it waits for work.
        self._beat: float | None = None
        self._stepped = False
        self._unfinished = 0
        self._work = threading.Condition()
        self._stopping = False
        self.stopped = False
        self._thread = threading.Thread(target=self._guarded, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; requests that have not finished are given up.

        A step that does not end is left behind, as by `abandon`.
        """
        with self._work:
            self._stopping = self.stopped = True
            self._work.notify_all()
        if self._thread.is_alive() and self.failure is None:
            self._thread.join(_LAST_STEP)
        if self._thread.is_alive():
            self.abandon("the server was stopped")
        else:
            self._give_up(EngineFailed("the server was stopped"))

    def abandon(self, reason: str) -> None:
        """Ends every request with an error; the thread may still hang in a step, whose results
        nobody gets. The engine is not touched: the step holds its lock."""
        with self._work:
            self.failure = self.failure or reason
            self._stopping = True
            arrived, self._inbox = self._inbox, []
            tickets, self._tickets = self._tickets, {}
            self._work.notify_all()
        for ticket in (*list(tickets.values()), *arrived):
            ticket.put(EngineDown(self.failure))

    def release(self) -> None:
        """After `stop`: drops the engine, whose cache is most of a version's memory, and its calls.

        Answers that are still read hold the service, and what it calls holds it too: neither the
        engine nor a version's weights must wait for them or for the garbage collector.
        """
        if not self._thread.is_alive():
            del self._engine, self._isolation
            self._on_step, self._on_end = None, lambda *_: None

    @property
    def trouble(self) -> str | None:
        """Why no request is decoded at present; None where requests are."""
        if self.failure is not None:
            return self.failure
        if not self._thread.is_alive():
            return "the engine's thread does not run"
        beat, limit = self._beat, self._step_limit * (1 if self._stepped else _FIRST_STEPS)
        if beat is not None and (seconds := self._clock() - beat) > limit:
            return f"a step of the engine has run for {seconds:.1f} s; {limit:g} s are allowed"
        return None

    @property
    def healthy(self) -> bool:
        """Whether requests are decoded."""
        return self.trouble is None

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return self._unfinished

    def open(self, request: Request) -> PartStream:
        """Hands a request in; its parts are read from what is returned, which must be closed.

        Raises:
            QueueFull: too many requests wait.
            EngineDown: the engine is dead, or hangs.
        """
        return PartStream(self._submit(request), self._retire)

    def _submit(self, request: Request) -> Ticket:
        with self._work:
            if self._thread.ident is not None and (trouble := self.trouble) is not None:
                raise EngineDown(trouble)
            if self._unfinished >= self.max_unfinished:
                raise QueueFull(f"{self._unfinished} requests wait or run already: try again later")
            ticket = Ticket(request, asyncio.get_running_loop())
            self._inbox.append(ticket)
            self._unfinished += 1
            self._work.notify_all()
        return ticket

    def _retire(self, ticket: Ticket) -> None:
        """A request has ended, or its client has gone."""
        with self._work:
            ticket.gone = True
            self._unfinished -= 1
            self._left.append(ticket)
            self._work.notify_all()

    # -- the engine's thread -------------------------------------------------------------------

    def _guarded(self) -> None:
        """The thread: whatever ends it, every request hears of it."""
        try:
            self._run()
        except BaseException as error:  # SystemExit and KeyboardInterrupt end a thread silently
            logger.exception("the engine's thread ended")
            self.abandon(f"the engine's thread ended: {type(error).__name__}: {error}")
        finally:
            self._beat = None

    def _step(self) -> list[StepOutput]:
        self._beat = self._clock()
        try:
            outputs = self._engine.step()
        except SystemExit as error:  # of a request's own code: its fault as any other is
            raise RuntimeError(f"SystemExit({error.code!r})") from error
        self._stepped = True
        return outputs

    def _run(self) -> None:
        while True:
            self._beat = None
            with self._work:
                while not (self._stopping or self._inbox or self._left or self._engine.unfinished):
                    self._work.wait(_IDLE)
                if self._stopping:
                    return
                arrived, self._inbox = self._inbox, []
                left, self._left = self._left, []
            began = time.perf_counter()
            self._beat = self._clock()
            try:
                self._admit(arrived)
                self._abort(left)
                outputs = self._step()
            except Exception as error:
                if self.failure is not None:
                    return
                logger.exception("a step of the engine failed")
                if not self._isolate(error):
                    return
                outputs = []
            if self.failure is not None:  # it was abandoned meanwhile
                return
            self.stats = self._engine.stats()  # before a client can act on what it gets
            self._deliver(outputs)
            if self._on_step is not None:
                self._on_step(outputs, time.perf_counter() - began)

    def _admit(self, arrived: list[Ticket]) -> None:
        for ticket in arrived:
            if ticket.gone:
                continue
            ticket.entered = time.perf_counter()
            try:
                ticket.number = self._engine.add(ticket.request)
            except DeliberateError as error:
                ticket.put(error)
            except Exception as error:  # no other request's fault, and its client waits
                logger.exception("a request could not be taken")
                ticket.put(EngineFailed(f"this request failed: {type(error).__name__}: {error}"))
            else:
                self._tickets[ticket.number] = ticket

    def _abort(self, left: list[Ticket]) -> None:
        for ticket in left:
            if ticket.number is not None and self._tickets.pop(ticket.number, None) is not None:
                self._engine.abort(ticket.number)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        now, parts = time.perf_counter(), []
        for output in outputs:
            ticket = self._tickets.get(output.id)
            if ticket is None:
                continue
            part = Part(
                output.tokens,
                output.finished,
                output.trace,
                output.exit_layers,
                output.budget,
                output.logprobs,
                now,
            )
            parts.append((ticket, part))
            if output.finished is not None:
                del self._tickets[output.id]
                self._ended(ticket, output.trace)
        hand_over(parts)

    def _isolate(self, error: Exception) -> bool:
        """Ends the requests that make steps fail; whether any can be decoded still."""
        try:
            found = self._isolation.after(error, list(self._tickets))
        except EngineBroken as broken:
            self.failure = f"the engine failed: {broken}"
            self._give_up(EngineDown(self.failure))
            return False
        for number, one in found.items():
            ticket = self._tickets.pop(number, None)
            if ticket is not None:
                self._ended(ticket, None)
                ticket.put(EngineFailed(f"this request failed: {type(one).__name__}: {one}"))
        return True

    def _ended(self, ticket: Ticket, trace: GenerationTrace | None) -> None:
        self._on_end(ticket.request, trace, time.perf_counter() - ticket.opened)

    def _give_up(self, error: Exception) -> None:
        """Ends every request with an error."""
        with self._work:
            arrived, self._inbox = self._inbox, []
        for number in self._tickets:
            with contextlib.suppress(Exception):
                self._engine.abort(number)
        for ticket in (*self._tickets.values(), *arrived):
            ticket.put(error)
        self._tickets = {}


def describe_stats(stats: EngineStats) -> dict[str, Any]:
    """The engine's counts, JSON-ready."""
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "free_blocks": stats.free_blocks,
        "tokens": stats.tokens,
        "steps": stats.steps,
        "preempted": stats.preempted,
        "tokens_per_second": stats.tokens_per_second,
        "depth": stats.depth,
    }
