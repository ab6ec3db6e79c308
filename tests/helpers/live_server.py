"""A server in a thread of this process, and clients whose order with it no clock decides."""

from __future__ import annotations

import contextlib
import inspect
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from deliberate.serving.app import Server, create_app
from deliberate.serving.service import EngineService

# Far longer than anything takes that goes well: only what never comes may fail a test.
PATIENCE = 120.0

# httpx gives up after 5 s, which an answer on a busy machine may take.
_default = inspect.signature(httpx.get).parameters["timeout"].default
_default.connect = _default.read = _default.write = _default.pool = PATIENCE


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """Starts the service and the HTTP server; yields its address."""
    config = uvicorn.Config(create_app(server), host="127.0.0.1", port=0, log_level="error")
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run, daemon=True)
    server.versions.start()
    thread.start()
    try:
        while not http.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join(10)
        server.versions.stop()


def wait_until(condition, seconds: float = PATIENCE) -> bool:
    """Whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def held(service: EngineService, after: int = 0) -> Iterator[None]:
    """The engine stops before the step after so many more, and goes on when the block ends.

    What is decoded is then still on its way whatever a client does in the block, and however late.
    """
    step, on = service._engine.step, threading.Event()
    left = after

    def waits():
        nonlocal left
        left -= 1
        if left < 0:
            on.wait(PATIENCE)
        return step()

    service._engine.step = waits
    try:
        yield
    finally:
        service._engine.step = step
        on.set()


def at_rest(service: EngineService) -> bool:
    """Whether the engine's thread comes to wait for work: it steps once more after an answer."""

    def rests() -> bool:
        with service._work:
            return bool(service._work._waiters) and not (service._left or service._inbox)

    return wait_until(lambda: service.unfinished == 0 and rests())


def sent(url: str, path: str, body: dict) -> socket.socket:
    """The connection of a client that has asked and reads nothing; closing it is going away."""
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n"
    made = socket.create_connection(("127.0.0.1", httpx.URL(url).port), PATIENCE)
    made.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + text)
    return made
