"""A server in a thread of this process, for tests that speak HTTP to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from deliberate.serving.app import Server, create_app


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


def wait_until(condition, seconds: float = 30.0) -> bool:
    """Whether a condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
