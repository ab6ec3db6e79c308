"""A client of `deliberate bench serve`: streams answers of a server on this machine and times them.

Times count from when a request was due, not from when it was sent: a load that falls behind would
otherwise hide the time its requests spent unsent. The client shares the machine with the server, so
it is one that takes little of it: aiohttp parses in C, and a refused request costs it a fourteenth
of what it costs httpx, a stream of 40 events less than a fourth.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from deliberate.eval.benchmarks.serve_load import Shot
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

OK = 200
# Answers of a server that takes no more: they are clean refusals.
REFUSALS = (429, 503)


def loopback_address(url: str) -> str:
    """`url` without a path, if it is plain HTTP to this machine.

    Raises:
        DeliberateError: it names another machine, or is no such address.
    """
    parts = urlsplit(str(url))
    host = parts.hostname or ""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        port = parts.port
    except ValueError:
        local, port = False, None
    if parts.scheme != "http" or not local or port is None or parts.path.strip("/"):
        raise DeliberateError(
            f"url={url}: load is sent to this machine only, give http://127.0.0.1:PORT"
        )
    return f"http://{parts.netloc}"


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        kind: of the request.
        status: of HTTP; 0 where there was no answer, or a stream that broke off.
        due: second at which it was due, from the load's beginning on.
        lag: seconds from then until it was sent.
        first: seconds from `due` to the first text; None without any.
        seconds: from `due` to the end.
        tokens: of the answer.
        gaps: seconds between the pieces of the stream.
        layers: run per token, as the server reports it.
        deadline_ms: of the request.
        text: of the answer.
        error: in one line; None where it was answered.
        prompt: of the request.
        met: whether the server says that it has kept the deadline; None where it says nothing.
    """

    kind: str
    status: int
    due: float
    lag: float
    first: float | None
    seconds: float
    tokens: int
    gaps: tuple[float, ...] = ()
    layers: float | None = None
    deadline_ms: float | None = None
    text: str = ""
    error: str | None = None
    prompt: tuple[int, ...] = ()
    met: bool | None = None

    @property
    def answered(self) -> bool:
        """With a whole answer."""
        return self.status == OK and self.error is None

    @property
    def refused(self) -> bool:
        """Cleanly: the server said that it takes no more, or cannot keep the deadline."""
        return self.status in REFUSALS or (self.status == 400 and "deadline" in (self.error or ""))

    @property
    def good(self) -> bool:
        """Answered within its deadline."""
        kept = self.deadline_ms is None or 1000 * self.seconds <= self.deadline_ms
        return self.answered and kept


class Client:
    """Sends requests to one server.

    Args:
        url: see `loopback_address`.
        timeout: seconds that one request may take.
        api_key: sent with every request.
        fidelity: of the requests; None leaves it to the server.
        send_deadlines: whether they state their deadlines.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        api_key: str | None = None,
        fidelity: str | None = None,
        send_deadlines: bool = True,
    ) -> None:
        self._url = loopback_address(url)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None
        self._timeout = timeout
        self._fidelity = fidelity
        self._send_deadlines = send_deadlines
        self._model = ""

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            self._url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=self._headers,
            read_bufsize=1 << 20,  # the longest line of a stream
        )
        try:
            async with asyncio.timeout(self._timeout), self._http.get("/v1/models") as answer:
                answer.raise_for_status()
                self._model = (await answer.json())["data"][0]["id"]
        except (aiohttp.ClientError, TimeoutError, LookupError, ValueError) as error:
            await self._session.close()
            reason = str(error) or type(error).__name__
            raise DeliberateError(f"url={self._url}: no server answers: {reason}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "a client is used with `async with`"
        return self._session

    async def send(self, shot: Shot, began: float, due: float) -> Outcome:
        """One request, streamed.

        Args:
            began: reading of `time.perf_counter` when the load began.
            due: second from then at which the request should be sent.
        """
        start = began + due
        lag = time.perf_counter() - start
        times: list[float] = []
        texts: list[str] = []
        facts: dict[str, Any] = {}
        status, error = 0, None
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.post("/v1/completions", json=self.body(shot)) as answer,
            ):
                status = answer.status
                if status != OK:
                    error = _message(await answer.read())
                else:
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            event = parse_json(line[6:].decode(), "a piece of the stream")
                            _read(event, times, texts, facts)
        except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
            status, error = 0, f"{type(problem).__name__}: {problem}"
        if status == OK and "usage" not in facts:
            status, error = 0, facts.get("error", "the stream broke off")
        own = facts.get("deliberate", {})
        return Outcome(
            kind=shot.kind,
            status=status,
            due=due,
            lag=lag,
            first=times[0] - start if times else None,
            seconds=time.perf_counter() - start,
            tokens=facts.get("usage", {}).get("completion_tokens", 0),
            gaps=tuple(b - a for a, b in itertools.pairwise(times)),
            layers=own.get("layers_per_token"),
            deadline_ms=shot.deadline_ms,
            text="".join(texts),
            error=error,
            prompt=shot.prompt,
            met=own.get("deadline_met"),
        )

    def body(self, shot: Shot) -> dict[str, Any]:
        """Of a completion, JSON-ready."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(shot.prompt),
            "max_tokens": shot.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **shot.fields,
        }
        if self._fidelity is not None:
            body["fidelity"] = self._fidelity
        if self._send_deadlines and shot.deadline_ms is not None:
            body["deadline_ms"] = shot.deadline_ms
        return body

    async def closed(self, source: Iterator[Shot], clients: int, each: int, seconds: float) -> Run:
        """`clients` that send their next request when the last was answered, `each` at most."""
        began = time.perf_counter()
        made: list[Outcome] = []

        async def one() -> None:
            for _ in range(each):
                shot = next(source, None)  # making it is not the server's time
                if shot is None:
                    return
                due = time.perf_counter() - began
                if due > seconds:
                    return
                made.append(await self.send(shot, began, due))

        await asyncio.gather(*(one() for _ in range(clients)))
        return Run(made, time.perf_counter() - began)

    async def open(self, shots: Sequence[Shot]) -> Run:
        """Every request at its arrival, whatever became of those before it."""
        began = time.perf_counter()
        tasks = []
        for shot in shots:
            wait = shot.arrival - (time.perf_counter() - began)
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self.send(shot, began, shot.arrival)))
        made = await asyncio.gather(*tasks)
        return Run(list(made), time.perf_counter() - began)


@dataclass(frozen=True)
class Run:
    """A load that was sent: what became of its requests, and seconds from beginning to end."""

    outcomes: list[Outcome]
    seconds: float


def _read(
    event: dict[str, Any], times: list[float], texts: list[str], facts: dict[str, Any]
) -> None:
    """Takes one event of a stream."""
    if "error" in event:
        facts["error"] = event["error"].get("message", "error")
    for name in ("usage", "deliberate"):
        if event.get(name):
            facts[name] = event[name]
    text = "".join(choice.get("text", "") for choice in event.get("choices", ()))
    if text:
        times.append(time.perf_counter())
        texts.append(text)


def _message(body: bytes) -> str:
    try:
        return str(parse_json(body.decode(), "an error")["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode("utf-8", "replace")
