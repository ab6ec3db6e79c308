"""Completions at the border: read, checked and answered before the framework's routing.

A request that must be refused is refused here, before anything of its prompt is looked at: in a
burst there are many of them, and what they cost is taken from those that are answered. The routes
of `deliberate.serving.app` describe the same two paths for ``/openapi.json``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from deliberate.serving.errors import ApiError, describe
from deliberate.serving.protocol import ChatRequest, CompletionRequest

Complete = Callable[[ChatRequest | CompletionRequest, Request], Awaitable[Response]]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    CHAT: ChatRequest,
    TEXT: CompletionRequest,
}


class CompletionEntry:
    """ASGI middleware around the framework's router, behind the guard.

    Args:
        app: what answers all other paths.
        complete: answers a body that was read.
    """

    def __init__(self, app: Any, complete: Complete) -> None:
        self._app = app
        self._complete = complete

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        kind = _KINDS.get(scope["path"]) if scope["type"] == "http" else None
        if kind is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            body = read_body(kind, request.headers.get("content-type"), await request.body())
            answer = await self._complete(body, request)
        except ClientDisconnect:
            return  # before its body had come
        except ApiError as error:
            answer = error.response()
        await answer(scope, receive, send)


def read_body(
    kind: type[ChatRequest] | type[CompletionRequest], content_type: str | None, raw: bytes
) -> ChatRequest | CompletionRequest:
    """A body of the protocol.

    Raises:
        ApiError: it is no JSON, or does not fit the protocol; the message names the first field at
            fault.
    """
    form = (content_type or "").partition(";")[0].strip().lower()
    if form != "application/json" and not (
        form.startswith("application/") and form[-5:] == "+json"
    ):
        # A page of another site may send any other type without asking this server first.
        raise ApiError(
            415, f"Content-Type {form or 'is missing'!r:.60}: a body of application/json is needed"
        )
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise ApiError(400, describe(error.errors())) from None
