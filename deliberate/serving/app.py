"""The HTTP surface: OpenAI's completions, models, health, metrics and version."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from deliberate import __version__
from deliberate.engine.request import Request as EngineRequest
from deliberate.serving.answer_stream import AnswerStream, as_api_error
from deliberate.serving.answers import Answer, Body, Choice
from deliberate.serving.errors import ApiError, api_error, invalid_body
from deliberate.serving.guard import Guard
from deliberate.serving.metrics import Metrics
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.serving.requests import RequestBuilder, now
from deliberate.serving.service import EngineService, describe_stats
from deliberate.serving.settings import ServerSettings
from deliberate.serving.text import AnswerText
from deliberate.utils.errors import DeliberateError

_STREAM = "text/event-stream"


class Server:
    """What the routes share.

    Args:
        service: decodes.
        builder: reads bodies.
        metrics: counts.
        settings: limits.
        model_name: what clients call the model.
        fidelity: of requests that name none.
        created: second since 1970 at which the model was loaded.

    Attributes:
        draining: no new request is taken.
    """

    def __init__(
        self,
        service: EngineService,
        builder: RequestBuilder,
        metrics: Metrics,
        settings: ServerSettings,
        model_name: str,
        fidelity: str,
        created: int,
    ) -> None:
        self.service = service
        self.builder = builder
        self.metrics = metrics
        self.settings = settings
        self.model_name = model_name
        self.fidelity = fidelity
        self.created = created
        self.draining = False

    async def complete(self, body: Body, request: Request) -> Response:
        """Answers either kind of completion."""
        arrival = now()
        if self.draining:
            raise ApiError(503, "the server is going down: try another", "overloaded_error")
        if body.fidelity is None:
            body = body.model_copy(update={"fidelity": self.fidelity})
        # Tokenizing a long prompt takes milliseconds that other streams should not wait for.
        requests = await asyncio.to_thread(self.builder.build, body, arrival)
        answer = Answer(body, len(requests[0].prompt_ids), arrival)
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        streams: list[AnswerStream] = []
        try:
            for index, one in enumerate(requests):
                streams.append(self._open(index, one, answer))
            if body.stream:
                # The first parts are awaited here, so that a refusal is still an HTTP status.
                await asyncio.gather(*(stream.begin() for stream in streams))
                events, streams = self._events(answer, streams), []
                return StreamingResponse(events, media_type=_STREAM)
            work = asyncio.create_task(self._whole(answer, streams))
            gone = asyncio.create_task(_disconnect(request))
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not work.done():
                work.cancel()
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(answer.whole(work.result(), now() - arrival))
        finally:
            for stream in streams:
                stream.close()

    def _open(self, index: int, request: EngineRequest, answer: Answer) -> AnswerStream:
        text = AnswerText(self.builder.tokenizer, answer.body.stops)
        limit = answer.arrival + self.settings.timeout_seconds
        try:
            parts = self.service.open(request)
        except DeliberateError as error:
            raise as_api_error(error) from None
        return AnswerStream(index, parts, text, answer, limit, self.metrics)

    async def _whole(self, answer: Answer, streams: list[AnswerStream]) -> list[Choice]:
        tasks = [asyncio.create_task(stream.whole()) for stream in streams]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _events(self, answer: Answer, streams: list[AnswerStream]) -> AsyncIterator[str]:
        """The server-sent events of a stream; choices as their tokens come."""
        queue: asyncio.Queue[tuple[AnswerStream, str | ApiError]] = asyncio.Queue()

        async def pump(stream: AnswerStream) -> None:
            try:
                while not stream.done:
                    queue.put_nowait((stream, await stream.more()))
            except ApiError as error:
                queue.put_nowait((stream, error))

        pumps = [asyncio.create_task(pump(stream)) for stream in streams]
        try:
            if answer.chat:
                for stream in streams:
                    yield _event(answer.opening(stream.index))
            for stream in streams:
                queue.put_nowait((stream, stream.begun))
            unfinished = {stream.index for stream in streams}
            while unfinished:
                stream, text = await queue.get()
                if isinstance(text, ApiError):
                    yield _event({"error": {"message": text.message, "type": text.kind}})
                    return
                if text:
                    yield _event(answer.chunk(stream.index, text))
                if stream.done and stream.index in unfinished:
                    unfinished.remove(stream.index)
                    yield _event(answer.chunk(stream.index, "", stream.finish))
            options = answer.body.stream_options
            usage = options is not None and options.include_usage
            done = [stream.choice() for stream in streams]
            yield _event(answer.closing(done, now() - answer.arrival, usage=usage))
            yield "data: [DONE]\n\n"
        finally:
            for task in pumps:
                task.cancel()
            for stream in streams:
                stream.close()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnect(request: Request) -> None:
    """Returns once the client has gone; its body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(server: Server) -> FastAPI:
    """The application; the service it decodes with is started and stopped by the caller."""
    app = FastAPI(title="deliberate", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_middleware(Guard, settings=server.settings, refused=server.metrics.note_refusal)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continues a chat."""
        return await server.complete(body, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues a text."""
        return await server.complete(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        one = {"id": server.model_name, "object": "model", "created": server.created}
        return {"object": "list", "data": [one | {"owned_by": "deliberate"}]}

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """200 while requests are decoded; 503 while draining, or after the engine failed."""
        state = "ok" if server.service.healthy else server.service.failure or "stopped"
        if server.draining:
            state = "draining"
        status = 200 if state == "ok" else 503
        body = {"status": state, "engine": describe_stats(server.service.stats)}
        return JSONResponse(body, status)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        text = server.metrics.text(server.service.stats)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of this package."""
        return {"version": __version__}

    return app
