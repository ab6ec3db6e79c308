"""What is checked before a request is read: its key and its size."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from deliberate.serving.errors import ApiError
from deliberate.serving.settings import ServerSettings

# Paths that need no key: a load balancer asks them, and the page has a field for it.
OPEN = ("/", "/health", "/metrics", "/version")


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
        refusal = self._refusal(scope["method"], scope["path"], headers)
        answer = self._app if refusal is None else refusal.response()
        await answer(scope, receive, counted)

    def _refusal(self, method: str, path: str, headers: dict[str, bytes]) -> ApiError | None:
        keys = self._settings.api_keys
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
