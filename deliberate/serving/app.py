"""The HTTP surface: OpenAI's completions, models, health, metrics and version."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from deliberate import __version__
from deliberate.data.prompts import has_chat_template
from deliberate.serving import openapi
from deliberate.serving.admin import add_admin
from deliberate.serving.admission import Admission
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.answers import Body
from deliberate.serving.budget_header import HEADER, with_header
from deliberate.serving.completion import Completions
from deliberate.serving.completion_entry import CHAT, TEXT, CompletionEntry
from deliberate.serving.errors import ApiError, api_error, http_error, invalid_body
from deliberate.serving.guard import Guard
from deliberate.serving.life_cycle import LifeCycle
from deliberate.serving.loop_lag import LoopLag
from deliberate.serving.metrics import Metrics
from deliberate.serving.page import add_page
from deliberate.serving.precheck import Precheck
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.serving.request_log import ARRIVAL, RequestLog
from deliberate.serving.requests import RequestBuilder, now
from deliberate.serving.service import EngineService, describe_stats
from deliberate.serving.settings import ServerSettings
from deliberate.serving.versions import ServedVersions
from deliberate.serving.watchdog import Watchdog


class Server:
    """What the routes share.

    Args:
        versions: decode.
        metrics: counts.
        settings: limits.
        model_name: what clients call the model.
        created: second since 1970 at which the model was loaded.
        cache: of answers, or None.
        life_cycle: changes versions; None where there is one for good.

    Attributes:
        draining: no new request is taken.
        lag: of the event loop.
    """

    def __init__(
        self,
        versions: ServedVersions,
        metrics: Metrics,
        settings: ServerSettings,
        model_name: str,
        created: int,
        cache: AnswerCache | None = None,
        life_cycle: LifeCycle | None = None,
    ) -> None:
        self.versions = versions
        self.metrics = metrics
        self.settings = settings
        self.model_name = model_name
        self.created = created
        self.life_cycle = life_cycle
        self.draining = False
        self.lag = LoopLag()
        registry = None if life_cycle is None else life_cycle.registry
        self.watchdog = Watchdog(versions, registry, note=metrics.engine_restarts.inc)
        self.completions = Completions(
            versions,
            metrics,
            settings,
            Precheck.of(settings.rules),
            Admission(
                lambda: versions.live.pace, settings.max_running, share=settings.admission_share
            ),
            cache,
        )

    @property
    def service(self) -> EngineService:
        """The engine that takes new requests."""
        return self.versions.live.service

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return self.versions.unfinished

    @property
    def builder(self) -> RequestBuilder:
        """What reads the bodies of new requests."""
        return self.versions.live.builder

    async def complete(self, body: Body, request: Request) -> Response:
        """Answers either kind of completion."""
        arrival = request.scope.get(ARRIVAL) or now()
        if self.draining:
            raise ApiError(503, "the server is going down: try another", "overloaded_error")
        body = with_header(body, request.headers.get(HEADER))
        return await self.completions.complete(body, request, arrival)


def create_app(server: Server) -> FastAPI:
    """The application; the service it decodes with is started and stopped by the caller."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """A canary goes on, and engines and versions are watched, while the server runs."""
        watches = (server.watchdog.watch(), server.lag.watch())
        watching = [asyncio.create_task(one) for one in watches]
        try:
            if server.life_cycle is not None:
                await server.life_cycle.resume()
                watching.append(asyncio.create_task(server.life_cycle.watch()))
            yield
        finally:
            for task in watching:
                task.cancel()

    app = FastAPI(
        title="deliberate",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, http_error)
    app.add_middleware(CompletionEntry, complete=server.complete)
    app.add_middleware(Guard, settings=server.settings, refused=server.metrics.note_refusal)
    lag = server.lag
    app.add_middleware(
        RequestLog, lag=lambda: lag.seconds
    )  # around the guard: its refusals have an id and a line, too

    # `CompletionEntry` answers these two; the routes say for /openapi.json what it takes.
    @app.post(CHAT, response_model=None, responses=openapi.completions(chat=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continues a chat."""
        return await server.complete(body, request)

    @app.post(TEXT, response_model=None, responses=openapi.completions(chat=False))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues a text."""
        return await server.complete(body, request)

    @app.get("/v1/models", responses=openapi.ERRORS)
    async def models() -> dict[str, Any]:
        """The one model."""
        one = {"id": server.model_name, "object": "model", "created": server.created}
        return {"object": "list", "data": [one | {"owned_by": "deliberate"}]}

    @app.get("/health", response_model=None, responses=openapi.health())
    async def health() -> Response:
        """200 while requests are decoded; 503 while draining, or the engine is dead or hangs."""
        state = server.service.trouble or "ok"
        if server.draining:
            state = "draining"
        status = 200 if state == "ok" else 503
        restarts = [one.to_dict() for one in server.watchdog.restarts]
        stats = describe_stats(server.service.stats)
        body = {"status": state, "engine": stats, "restarts": restarts}
        return JSONResponse(body, status)

    @app.get("/metrics", response_class=PlainTextResponse, responses=openapi.METRICS)
    async def metrics() -> Response:
        """For Prometheus."""
        cache = server.completions.cache
        server.metrics.note_versions(server.versions.states)
        text = server.metrics.text(server.service.stats, None if cache is None else cache.counts)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of this package."""
        return {"version": __version__}

    add_admin(app, server.life_cycle)
    add_page(
        app,
        server.model_name,
        server.metrics.layers,
        has_chat_template(server.builder.tokenizer),
    )
    openapi.state_limits(app, server.model_name, server.settings)
    return app
