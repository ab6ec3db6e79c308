"""OpenTelemetry traces: one span a request, sent to a collector that the operator names.

Nothing is sent anywhere unless a collector was given. Names of attributes are those of
OpenTelemetry's semantic conventions for HTTP.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from deliberate import __version__
from deliberate.installation import install_extra
from deliberate.serving.request_log import HEADER
from deliberate.utils.errors import DeliberateError

_PATH = "/v1/traces"


class Traces:
    """ASGI middleware: a span for each request, a child of the caller's where it names one.

    A span lasts until the end of the answer; the event ``first byte`` says when that began. An
    answer from status 500 on, and one that broke off, is an error.

    Args:
        app: behind it.
        provider: an OpenTelemetry ``TracerProvider``, see `provider_for`.
    """

    def __init__(self, app: Any, provider: Any) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        self._app = app
        self._extract, self._error = extract, StatusCode.ERROR
        self._kind = SpanKind.SERVER
        self._tracer = provider.get_tracer("deliberate", __version__)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        carried = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method, path = scope["method"], scope["path"]
        # The route is the path here: no path has a part that differs from request to request.
        given = {"http.request.method": method, "url.path": path, "url.scheme": scope["scheme"]}
        with self._tracer.start_as_current_span(
            f"{method} {path}", self._extract(carried), self._kind, attributes=given
        ) as span:
            complete = False

            async def watched(message: Any) -> None:
                nonlocal complete
                if message["type"] == "http.response.start":
                    self._begin(span, message)
                elif message["type"] == "http.response.body":
                    complete = not message.get("more_body", False)
                await send(message)

            await self._app(scope, receive, watched)
            span.set_attribute("deliberate.answer_complete", complete)
            if not complete:
                span.set_status(self._error, "the answer broke off")

    def _begin(self, span: Any, message: Any) -> None:
        status = message["status"]
        span.set_attribute("http.response.status_code", status)
        span.add_event("first byte")
        for key, value in message.get("headers", ()):
            if key == HEADER.encode():
                span.set_attribute("deliberate.request_id", value.decode("latin-1"))
        if status >= 500:
            span.set_status(self._error)


def provider_for(collector: str, model: str) -> Any:
    """A provider whose spans go to a collector by OTLP over HTTP, in the background.

    Args:
        collector: ``http://HOST:PORT``.
        model: what clients call the model; an attribute of every span.

    Raises:
        DeliberateError: no such address, or the extra is missing.
    """
    parts = urlsplit(collector)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise DeliberateError(f"--otlp {collector}: give the collector's address, http://HOST:PORT")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise DeliberateError(f"--otlp needs {error.name}: {install_extra('otel')}") from None
    path = parts.path.rstrip("/") or _PATH
    made = TracerProvider(
        resource=Resource.create(
            {
                "service.name": "deliberate",
                "service.version": __version__,
                "deliberate.model": model,
            }
        )
    )
    exporter = OTLPSpanExporter(endpoint=f"{parts.scheme}://{parts.netloc}{path}")
    made.add_span_processor(BatchSpanProcessor(exporter))
    return made


def traced(app: Any, provider: Any | None) -> Any:
    """The application with traces; itself where there is no provider."""
    return app if provider is None else Traces(app, provider)
