"""What is checked before a request is read: its key and its size."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from deliberate.serving.errors import ApiError
from deliberate.serving.settings import LOOPBACK, ServerSettings

# Paths that need no key: a load balancer asks them, and the page has a field for it.
OPEN = ("/", "/health", "/metrics", "/version")

ADMIN = "/admin"
# What a proxy on this machine adds for a client that is elsewhere.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class Guard:
    """ASGI middleware: keys and body sizes are checked first; answers that are errors are counted.

    Args:
        app: behind it.
        settings: keys and limits.
        refused: called with the status of every answer from 400 on.
    """

    def __init__(self, app: Any, settings: ServerSettings, refused: Callable[[int], None]) -> None:
        self._app = app
        self._settings = settings
        self._refused = refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._refused(message["status"])
            await send(message)

        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        answer = self._app if refusal is None else refusal.response()
        await answer(scope, receive, counted)

    def _refusal(self, scope: Any, headers: dict[str, bytes]) -> ApiError | None:
        method, path = scope["method"], scope["path"]
        keys = self._settings.api_keys
        if path.startswith(ADMIN):
            if self._settings.admin_key is not None:
                keys = (self._settings.admin_key,)
            elif not _from_here(scope, headers):
                return ApiError(
                    403,
                    f"{ADMIN} is for this machine: call it by a loopback address and through no "
                    "proxy, or start the server with --admin-key",
                    "permission_error",
                )
        if keys and path not in OPEN:
            given = headers.get("authorization", b"").removeprefix(b"Bearer ")
            # Every key is compared: the time must not tell which one is near.
            matches = [hmac.compare_digest(given, key.encode()) for key in keys]
            if not any(matches):
                return ApiError(401, "the API key is missing or unknown", "authentication_error")
        if method != "POST":
            return None
        size = headers.get("content-length", b"").decode("latin-1")
        if not size.isdigit():
            return ApiError(411, "a body needs a Content-Length header")
        if int(size) > self._settings.max_body_bytes:
            return ApiError(413, f"a body of {size} bytes: {self._settings.max_body_bytes} at most")
        return None


def _from_here(scope: Any, headers: dict[str, bytes]) -> bool:
    """Whether a connection comes from this machine, as a person there would make it.

    A page of another site that a browser here shows is not that: it comes under its own name
    (``Host``), or names where it comes from (``Origin``).
    """
    client, host = scope.get("client"), headers.get("host", b"").decode("latin-1")
    name = host.rsplit(":", 1)[0].strip("[]")
    origin = headers.get("origin")
    return (
        client is not None
        and client[0] in LOOPBACK
        and name in LOOPBACK
        and origin in (None, f"http://{host}".encode())
        and not any(one in headers for one in _FORWARDED)
    )
