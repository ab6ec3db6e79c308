"""uvicorn around an application: says where it listens, and drains before it goes down."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import uvicorn

from deliberate.serving.settings import ServerSettings

logger = logging.getLogger(__name__)


class Drainable(Protocol):
    """What takes requests.

    Attributes:
        draining: no new request is taken.
    """

    draining: bool

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        ...


async def run_http(app: Any, taken: Drainable, settings: ServerSettings, name: str) -> None:
    """Serves an ASGI application until SIGTERM or Ctrl-C, which let running requests finish.

    Args:
        app: what is served.
        taken: its requests.
        settings: address and limits.
        name: of the model, for the line that says where it is served.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        log_config=None,  # its lines go where the other lines go
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    http = _Http(config)
    signalled = asyncio.Event()
    http.on_exit = signalled.set
    if settings.public:
        logger.warning("listening on %s: every machine that reaches it can use it", settings.host)
    task = asyncio.create_task(http.serve())
    while not http.started and not task.done():
        await asyncio.sleep(0.01)
    if http.started:
        port = http.servers[0].sockets[0].getsockname()[1]
        print(f"serving {name} on http://{settings.host}:{port}", flush=True)
    drain = asyncio.create_task(_drain(taken, http, signalled, settings.drain_seconds))
    await task
    drain.cancel()


async def _drain(taken: Drainable, http: _Http, signalled: asyncio.Event, seconds: float) -> None:
    """After a signal: lets running requests finish, for so long at most, then ends the server."""
    await signalled.wait()
    taken.draining = True
    end = time.monotonic() + seconds
    while taken.unfinished and time.monotonic() < end:
        await asyncio.sleep(0.02)
    http.should_exit = True


class _Http(uvicorn.Server):
    """uvicorn that calls `on_exit` at a signal and goes on, so that health can say "draining"."""

    on_exit: Callable[[], None]
    _signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal ends it at once."""
        if sig in (signal.SIGTERM, signal.SIGINT) and not self._signalled:
            self._signalled = True
            self.on_exit()
            return
        self.force_exit = self.should_exit = True
