"""Traces go to the collector that was named, to nobody else, and say what became of a request."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import deliberate.serving
from deliberate.serving.request_log import RequestLog
from deliberate.serving.tracing import Traces, provider_for, traced
from deliberate.utils.errors import DeliberateError

MONITORING = Path(deliberate.serving.__path__[0]) / "monitoring"


@pytest.fixture
def spans():
    pytest.importorskip("opentelemetry.sdk", reason="the package opentelemetry-sdk is missing")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def app(status: int = 200, whole: bool = True):
    async def answer(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        if whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    return RequestLog(answer)


def ask(made, **headers) -> None:
    async def send() -> None:
        transport = httpx.ASGITransport(made)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            with contextlib.suppress(AssertionError):  # of an answer that broke off
                await client.post("/v1/completions", headers=headers)

    asyncio.run(send())


def test_a_span_says_what_became_of_a_request_under_its_callers_trace(spans) -> None:
    provider, exporter = spans
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ask(Traces(app(), provider), **{"traceparent": parent, "x-request-id": "mine"})
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/completions" and span.events[0].name == "first byte"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["deliberate.request_id"] == "mine"
    assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{span.parent.span_id:016x}" == parent.split("-")[2]
    assert span.status.is_unset and span.attributes["deliberate.answer_complete"]


@pytest.mark.parametrize("given", [{"status": 500}, {"whole": False}])
def test_failures_and_answers_that_break_off_are_errors(spans, given) -> None:
    provider, exporter = spans
    ask(Traces(app(**given), provider))
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok and not span.status.is_unset


def test_without_a_collector_the_application_is_as_it_was() -> None:
    plain = app()
    assert traced(plain, None) is plain


def test_a_collector_needs_an_address_and_the_extra(monkeypatch) -> None:
    for wrong in ("collector:4318", "file:///tmp/x", "http://", "http://h?x=1"):
        with pytest.raises(DeliberateError, match="--otlp"):
            provider_for(wrong, "tiny")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(DeliberateError, match=r"\[otel\]"):
        provider_for("http://127.0.0.1:4318", "tiny")


def test_spans_reach_the_collector() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="no OTLP exporter")
    import http.server
    import threading

    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        provider = provider_for(f"http://127.0.0.1:{collector.server_port}", "tiny")
        ask(traced(app(), provider))
        provider.shutdown()
        collector.shutdown()
    assert got[0][0] == "/v1/traces" and b"POST /v1/completions" in got[0][1]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_alert_rules() -> None:
    rules = str(MONITORING / "alerts.yaml")
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
