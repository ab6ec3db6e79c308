"""One log line a request, and ids that tie a client's request to it."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger("deliberate.serving.requests")
HEADER = "x-request-id"
# Key of the scope: second of the engine's clock at which the request came.
ARRIVAL = "deliberate.arrival"
# What a client may choose: it goes into logs and into a header.
_ALLOWED = re.compile(r"[\w.:-]{1,128}", re.ASCII)

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being answered; None outside of one."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, request id, its own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        made: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        known = request_id.get()
        if known is not None:
            made["request_id"] = known
        made |= getattr(record, "fields", {})
        if record.exc_info:
            made["exception"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=False)


def log_as_json() -> None:
    """Sends every log line of this process to stderr as JSON, requests included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO)


class RequestLog:
    """ASGI middleware: gives each request an id, its client's own where that is fit, and logs it.

    The id is answered in the header ``x-request-id``. Lines are at level INFO and have method,
    path, status, seconds until the answer began and until it ended, bytes, and whether the client
    went away before.

    Args:
        app: behind it.
        lag: called for the seconds that a request may have waited before it was seen; they count
            as its own.
    """

    def __init__(self, app: Any, lag: Callable[[], float] = lambda: 0.0) -> None:
        self._app = app
        self._lag = lag

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER.encode(), b"").decode("latin-1")
        name = given if _ALLOWED.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(name)
        began = time.perf_counter()
        scope[ARRIVAL] = began - self._lag()
        seen: dict[str, Any] = {"status": None, "begun": None, "bytes": 0, "complete": False}

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                seen["begun"] = round(time.perf_counter() - began, 6)
                headers = [*message.get("headers", ()), (HEADER.encode(), name.encode())]
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                seen["bytes"] += len(message.get("body", b""))
                seen["complete"] = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if logger.isEnabledFor(logging.INFO):
                fields = {"method": scope["method"], "path": scope["path"]} | seen
                fields["seconds"] = round(time.perf_counter() - began, 6)
                logger.info("request", extra={"fields": fields})
            request_id.reset(token)
