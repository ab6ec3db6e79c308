"""The HTTP front of several replicas: one address, one answer, one retry where a replica ends.

The front reads as much of a body as routing needs and hands the request on whole; checks, limits
and answers are those of the replica's own server. A request whose replica ends before anything of
its answer was sent to the client is sent to another one, once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.routing import Route

from deliberate.serving.errors import ApiError, error_body
from deliberate.serving.request_log import HEADER, RequestLog, request_id
from deliberate.serving.scale.merged_metrics import merged
from deliberate.serving.scale.messages import (
    Call,
    Headers,
    Overloaded,
    ReplicaLost,
    Replicas,
    Reply,
    described,
)
from deliberate.serving.settings import ServerSettings

TRIES = 2
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
# Of one connection, not of what is answered.
_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"content-length"}


class Front:
    """Answers requests by replicas.

    Args:
        replicas: that decode.
        settings: limits of the front: size of a body, expected answer.
        retry_after: seconds that a refused client is told to wait.

    Attributes:
        draining: no new request is taken.
        retried: requests that were sent to a second replica.
    """

    def __init__(self, replicas: Replicas, settings: ServerSettings, retry_after: int = 1) -> None:
        self.draining = False
        self.retried = 0
        self._replicas = replicas
        self._settings = settings
        self._retry_after = retry_after
        self._unfinished = 0

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return self._unfinished

    def app(self) -> Any:
        """The ASGI application, with request ids and their log lines."""
        made = Starlette(routes=[Route("/{path:path}", self.respond, methods=_METHODS)])
        made.add_middleware(RequestLog)
        return made

    async def respond(self, request: Request) -> Response:
        """The answer to one request."""
        path = request.url.path
        try:
            if path == "/health":
                return await self._health()
            if path == "/metrics":
                text = merged(await self._replicas.metrics(), {"retried": self.retried})
                return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
            if path.startswith("/admin"):
                raise ApiError(
                    404, "replicas serve one version: /admin is of a server without --replicas"
                )
            return await self._forward(request)
        except ApiError as error:
            return error.response()

    async def _health(self) -> Response:
        """200 while at least one replica decodes requests."""
        found = await self._replicas.health()
        well = [name for name, one in found.items() if one.get("status") == "ok"]
        state = "draining" if self.draining else "ok" if well else "no replica decodes requests"
        return JSONResponse({"status": state, "replicas": found}, 200 if state == "ok" else 503)

    async def _forward(self, request: Request) -> Response:
        if self.draining:
            raise ApiError(503, "the server is going down: try another", "overloaded_error")
        call = await self._call(request)
        self._unfinished += 1
        handed = False
        work = asyncio.create_task(self._begin(call))
        gone = asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            made = _Parts(*work.result(), self._ended)
            handed = True
            return made
        finally:
            gone.cancel()
            work.cancel()
            if not handed:
                self._ended()

    def _ended(self) -> None:
        self._unfinished -= 1

    async def _call(self, request: Request) -> Call:
        most = self._settings.max_body_bytes
        size = request.headers.get("content-length", "0")
        if not size.isdigit() or int(size) > most:
            raise ApiError(413, f"a body of {size} bytes: {most} at most")
        body = await request.body()
        size_of, keys, streams = described(body, self._settings.default_new_tokens)
        headers: Headers = tuple((k, v) for k, v in request.headers.raw if k != HEADER.encode())
        name = request_id.get()
        if name is not None:
            headers += ((HEADER.encode(), name.encode()),)
        client = None if request.client is None else (request.client.host, request.client.port)
        query = request.url.query.encode()
        path = request.url.path
        return Call(request.method, path, query, headers, body, client, size_of, keys, streams)

    async def _begin(self, call: Call) -> tuple[Reply, AsyncIterator[Reply]]:
        """First part and the rest; of an answer that is no stream the first part is all of it.

        Raises:
            ApiError: no replica takes it, or those that were tried ended.
        """
        for attempt in range(1, TRIES + 1):
            parts = self._replicas.open(call)
            try:
                first = await anext(parts)
                if first.status == 503 and attempt < TRIES:
                    await _close(parts)
                    self.retried += 1
                    continue  # it goes down, or its engine died: another may take it
                if not _streams(first):
                    bodies = [first.body, *[one.body async for one in parts]]
                    return Reply(first.status, first.headers, b"".join(bodies)), parts
                return first, parts
            except Overloaded as error:
                raise ApiError(
                    429, str(error), "overloaded_error", retry_after=self._retry_after
                ) from None
            except (ReplicaLost, StopAsyncIteration):
                if attempt < TRIES:
                    self.retried += 1
            except asyncio.CancelledError:
                await _close(parts)
                raise
        raise ApiError(
            503,
            f"{TRIES} replicas ended before the answer did: try again",
            "overloaded_error",
            retry_after=self._retry_after,
        )


class _Parts(StreamingResponse):
    """An answer in parts, which are closed even where the client went before it began.

    Args:
        first: with the status.
        rest: of the answer.
        ended: called once.
    """

    def __init__(self, first: Reply, rest: AsyncIterator[Reply], ended: Callable[[], None]) -> None:
        assert first.status is not None
        headers = {
            key.decode("latin-1"): value.decode("latin-1")
            for key, value in first.headers
            if key not in _HOP
        }
        media = headers.pop("content-type", None)
        super().__init__(_bodies(first, rest), first.status, headers, media)
        self._rest = rest
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
            await _close(self._rest)


async def _bodies(first: Reply, rest: AsyncIterator[Reply]) -> AsyncIterator[bytes]:
    yield first.body
    try:
        async for one in rest:
            yield one.body
    except ReplicaLost:
        # What was sent stays sent: the client is told, and may ask again.
        text = "the replica ended before the answer did: try again"
        yield f"data: {json.dumps(error_body(text, 'overloaded_error'))}\n\n".encode()


def _streams(first: Reply) -> bool:
    return any(
        k == b"content-type" and v.startswith(b"text/event-stream") for k, v in first.headers
    )


async def _close(parts: AsyncIterator[Any]) -> None:
    close = getattr(parts, "aclose", None)
    if close is not None:
        await close()


async def _disconnect(request: Request) -> None:
    """Returns once the client has gone; its body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
