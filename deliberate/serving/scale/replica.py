"""One replica: a server over one engine whose application is called without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from deliberate.serving.app import Server, create_app
from deliberate.serving.scale.messages import Call, Reply
from deliberate.serving.service import describe_stats
from deliberate.serving.settings import ServerSettings
from deliberate.utils.errors import DeliberateError

# Seconds that an application may take to notice that nobody reads its answer.
_CLOSE_SECONDS = 5.0
# Weight of the newest interval or answer in a mean.
_NEWEST = 0.1


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is started with.

    Attributes:
        model: bundled model, folder, GGUF file or hub name.
        served_name: what clients call it.
        settings: limits.
        executor, weights, fidelity: as of `deliberate serve`.
        threads: of torch and the kernels in its process; None: their own number.
    """

    model: str
    served_name: str
    settings: ServerSettings = field(default_factory=ServerSettings)
    executor: str = "auto"
    weights: str | None = None
    fidelity: str | None = None
    threads: int | None = None


class EngineReplica:
    """A server without HTTP in front of it.

    Args:
        server: whose service it starts.

    Raises:
        DeliberateError: the server changes versions, which each replica would do by itself.
    """

    def __init__(self, server: Server) -> None:
        if server.life_cycle is not None:
            raise DeliberateError("a replica serves one version: start it without a registry")
        self._server = server
        self._app = create_app(server)
        self._seen = _Seen()
        server.versions.start()

    def stop(self) -> None:
        """Ends its engine."""
        self._server.versions.stop()

    async def answer(self, call: Call) -> AsyncIterator[Reply]:
        """The answer in parts; the status comes with the first bytes of the body."""
        gone, sent = asyncio.Event(), asyncio.Queue[dict[str, Any] | None]()
        body: bytes | None = call.body

        async def receive() -> dict[str, Any]:
            nonlocal body
            if body is not None:
                message, body = {"type": "http.request", "body": body, "more_body": False}, None
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.put_nowait(message)

        async def run() -> None:
            try:
                await self._app(_scope(call), receive, send)
            finally:
                sent.put_nowait(None)

        began = time.monotonic()
        task = asyncio.create_task(run())
        try:
            async for reply in _parts(sent):
                yield reply
            await task
            if call.method == "POST":
                self._seen.note(began, time.monotonic())
        finally:
            gone.set()
            if not task.done():
                with contextlib.suppress(asyncio.TimeoutError, Exception):
                    await asyncio.wait_for(task, _CLOSE_SECONDS)

    # -- what it reports -------------------------------------------------------------------------

    def routing_state(self) -> dict[str, Any]:
        """For `replica_score.ReplicaState.read`, and requests that wait or run."""
        version, settings = self._server.versions.live, self._server.settings
        stats, pace = version.service.stats, version.pace
        alone, full = (pace.token_seconds(n) or 0.0 for n in (1, settings.max_running))
        return {
            "token_seconds": alone,
            # Where only one load is known, the pace says the same of every load.
            "full_token_seconds": 0.0 if full == alone else full,
            "prompt_seconds": (pace.prompt_seconds(100) or 0.0) / 100,
            "answer_seconds": self._seen.seconds,
            "free_memory": min(1.0, stats.free_blocks / self._blocks(stats.free_blocks)),
            "slots": settings.max_running,
            "shares_prefixes": settings.block_tokens is not None,
            "unfinished": version.service.unfinished,
        }

    def load(self) -> dict[str, float]:
        """For `autoscaling.fleet_load`: requests a second, seconds of one, places."""
        return {
            "arrivals_per_second": self._seen.rate(time.monotonic()),
            "service_seconds": self._seen.seconds,
            "slots": float(self._server.settings.max_running),
        }

    def health(self) -> dict[str, Any]:
        """What `/health` of a server says."""
        service = self._server.service
        return {"status": service.trouble or "ok", "engine": describe_stats(service.stats)}

    def metrics(self) -> str:
        """What `/metrics` of a server says."""
        server = self._server
        cache = server.completions.cache
        server.metrics.note_versions(server.versions.states)
        counts = None if cache is None else cache.counts
        return server.metrics.text(server.service.stats, counts).decode()

    def check(self) -> None:
        """Whether requests are decoded.

        Raises:
            DeliberateError: the engine is dead or hangs; a new replica has to take its place.
        """
        trouble = self._server.service.trouble
        if trouble is not None:
            raise DeliberateError(f"the replica is dead: {trouble}")

    def _blocks(self, free: int) -> int:
        self._seen.most_free = max(self._seen.most_free, free, 1)
        return self._seen.most_free


@dataclass
class _Seen:
    """Means over the requests that were answered.

    Attributes:
        seconds: of one, from when it came here to its end.
        most_free: blocks that were free at once.
    """

    seconds: float = 0.0
    most_free: int = 0
    _gap: float | None = None
    _last: float | None = None

    def note(self, began: float, ended: float) -> None:
        took = ended - began
        self.seconds = took if not self.seconds else self.seconds + _NEWEST * (took - self.seconds)
        if self._last is not None:
            gap = max(0.0, ended - self._last)
            self._gap = gap if self._gap is None else self._gap + _NEWEST * (gap - self._gap)
        self._last = ended

    def rate(self, now: float) -> float:
        """Answers a second; it falls while none comes."""
        if self._gap is None or self._last is None:
            return 0.0
        return 1.0 / max(self._gap, _NEWEST * (now - self._last), 1e-6)


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": call.client,
        "server": None,
    }


async def _parts(sent: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[Reply]:
    """Messages of an application as parts: what is there together is one part."""
    status: int | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    ended = False
    while not ended:
        message = await sent.get()
        chunks: list[bytes] = []
        while True:
            if message is None:
                ended = True
                break
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = tuple((bytes(k), bytes(v)) for k, v in message.get("headers", ()))
            else:
                chunks.append(message.get("body", b""))
            if sent.empty():
                break
            message = sent.get_nowait()
        if chunks:
            yield Reply(status, headers, b"".join(chunks))
            status, headers = None, ()
