"""One completion, from its body to its response: checked, admitted, decoded, read."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from deliberate.engine.request import Request as EngineRequest
from deliberate.serving.admission import Admission
from deliberate.serving.answer_cache import AnswerCache
from deliberate.serving.answer_stream import AnswerStream, as_api_error
from deliberate.serving.answers import Answer, Body
from deliberate.serving.chains import ChainFeed, ChainSource, chains_asked, has_chains
from deliberate.serving.errors import ApiError
from deliberate.serving.flight import Flight, Reader
from deliberate.serving.metrics import Metrics
from deliberate.serving.precheck import Passed, Precheck
from deliberate.serving.protocol import ChatRequest
from deliberate.serving.quotas import Quotas, Use, client_of
from deliberate.serving.requests import now
from deliberate.serving.served_version import ServedVersion
from deliberate.serving.service import QueueFull
from deliberate.serving.settings import ServerSettings
from deliberate.serving.versions import ServedVersions
from deliberate.utils.errors import DeliberateError


class Completions:
    """Answers completions of both kinds.

    Args:
        versions: read bodies and decode.
        metrics: counts.
        settings: limits.
        precheck: the rules that come first.
        admission: whether a deadline can be met.
        cache: of answers, or None.
    """

    def __init__(
        self,
        versions: ServedVersions,
        metrics: Metrics,
        settings: ServerSettings,
        precheck: Precheck,
        admission: Admission,
        cache: AnswerCache | None = None,
    ) -> None:
        self.precheck = precheck
        self.admission = admission
        self.cache = cache
        self.quotas = Quotas(settings.quota)
        self._flights: dict[str, Flight] = {}
        self._versions = versions
        self._metrics = metrics
        self._settings = settings

    async def complete(self, body: Body, request: Request, arrival: float) -> Response:
        """The response to a body that arrived at that second.

        Raises:
            ApiError: it is refused, or its decoding failed.
        """
        self._check_room(body, arrival)
        with contextlib.ExitStack() as stack:
            version = self._versions.enter()
            stack.callback(version.release)
            body = version.with_defaults(body)
            use = self._enter_quota(request)
            stack.callback(use.close)
            passed = self.precheck.enter(body)
            stack.callback(passed.close)
            self._metrics.precheck.observe(passed.seconds)
            # Tokenizing a long prompt takes milliseconds that other streams should not wait for.
            most = passed.rules.max_tokens
            builder = version.builder
            if has_chains(body):
                if body.images:
                    raise ApiError(
                        400, "reasoning or votes with images: they read text alone; leave one out"
                    )
                return await self._chains(version, body, request, arrival, passed, use, stack)
            if builder.quick(body):
                requests = builder.build(body, arrival, most)
            else:
                requests = await asyncio.to_thread(builder.build, body, arrival, most)
            prompt, limit = len(requests[0].prompt_ids), requests[0].max_new_tokens
            passed.check_length(prompt)
            answer = Answer(body, prompt, arrival, version.number)
            answer.reasoning_budget = version.builder.reasoning.budget(body, limit)
            if isinstance(body, ChatRequest) and body.callable_tools:
                answer.tools = version.builder.tool_format
            self._metrics.prompt_tokens.inc(prompt)
            use.take(prompt + limit * body.n)
            flight = await self._flight(version, requests, answer, limit)
            stack.callback(lambda: _give_back(use, prompt, flight))
            return await self._respond(answer, flight, request, stack)

    async def _chains(
        self,
        version: ServedVersion,
        body: Body,
        request: Request,
        arrival: float,
        passed: Passed,
        use: Use,
        stack: contextlib.ExitStack,
    ) -> Response:
        """The response to a body with ``reasoning`` or ``votes``."""
        builder, settings = version.builder, self._settings
        inputs = asyncio.to_thread(builder.inputs, body, passed.rules.max_tokens)
        prompt, limit = await inputs
        passed.check_length(len(prompt))
        default = settings.thinking_token_budget
        wanted = chains_asked(body, limit, settings.reasoning_tags, default)
        answer = Answer(body, len(prompt), arrival, version.number)
        answer.reasoning_budget = wanted.settings.budget
        self._metrics.prompt_tokens.inc(len(prompt))
        use.take(len(prompt) + limit * body.n * wanted.most)
        until = arrival + settings.timeout_seconds
        feed = ChainFeed(body.n)
        work = asyncio.create_task(
            version.chains.run(body, prompt, limit, wanted, until, settings.max_waiting, feed)
        )
        sources = [ChainSource(at, work, feed, answer, prompt, builder) for at in range(body.n)]
        flight = Flight(sources)
        stack.callback(lambda: _give_back(use, len(prompt), flight))
        return await self._respond(answer, flight, request, stack)

    @staticmethod
    async def _respond(
        answer: Answer, flight: Flight, request: Request, stack: contextlib.ExitStack
    ) -> Response:
        reader = flight.reader()
        stack.callback(reader.close)
        if answer.body.stream:
            # The first parts are awaited here, so that a refusal is still an HTTP status.
            await reader.begin()
            return _EventResponse(_events(answer, reader), stack.pop_all())
        return await _whole(answer, reader, request)

    def _check_room(self, body: Body, arrival: float) -> None:
        """Refuses what would be refused in any case, before its prompt is read.

        Raises:
            ApiError: the queue is full, or the deadline cannot be met whatever the prompt.
        """
        if self.cache is not None:  # a kept answer needs no room
            return
        service = self._versions.live.service
        # More choices than may be are not a matter of room: they are refused by name later.
        choices = min(body.n, self._settings.max_choices)
        if service.unfinished + choices > service.max_unfinished:
            raise self._full(f"{service.unfinished} requests wait or run already: try again later")
        if body.deadline_ms is not None:
            prompt = getattr(body, "prompt", None)
            known = len(prompt) if isinstance(prompt, list) else 1
            limit = body.limit or self._settings.default_new_tokens
            self.admission.check(known, limit, body.n, body.deadline_ms, arrival)

    def _full(self, message: str) -> ApiError:
        wait = self.admission.retry_after
        return ApiError(429, message, "overloaded_error", retry_after=wait)

    def _enter_quota(self, request: Request) -> Use:
        client = None if request.client is None else request.client.host
        header, keys = request.headers.get("authorization"), bool(self._settings.api_keys)
        return self.quotas.enter(client_of(header, client, keys=keys))

    async def _flight(
        self, version: ServedVersion, requests: list[EngineRequest], answer: Answer, limit: int
    ) -> Flight:
        """The answer: kept, on its way already, or begun.

        Raises:
            ApiError: as `_start`.
        """
        cache = self.cache
        if cache is None:
            return self._start(version, requests, answer, limit)
        identity = version.identity.recent()
        key = cache.key(answer.body, requests, identity)
        if key is None:
            return self._start(version, requests, answer, limit)
        if key not in self._flights:
            found = await cache.get(key)
            if found is not None:
                answer.cache = "hit"
                return Flight((), choices=found)
        if key in self._flights:
            answer.cache = "shared"
            cache.counts.shared += 1
            return self._flights[key]

        def ended(flight: Flight) -> None:
            if self._flights.get(key) is flight:
                del self._flights[key]
            # Weights that were changed meanwhile may have made a part of it.
            if flight.error is None and version.identity() == identity:
                cache.put(key, flight.choices)

        answer.cache = "miss"
        cache.counts.missed += 1
        flight = self._flights[key] = self._start(version, requests, answer, limit, ended)
        return flight

    def _start(
        self,
        version: ServedVersion,
        requests: list[EngineRequest],
        answer: Answer,
        limit: int,
        ended: Callable[[Flight], None] = lambda _: None,
    ) -> Flight:
        """Hands requests to the engine; `ended` is called with the answer's end.

        Raises:
            ApiError: their deadline cannot be met, or the queue is full.
        """
        body = answer.body
        place = self.admission.enter(
            answer.prompt_tokens, limit, body.n, body.deadline_ms, answer.arrival
        )
        # Equal requests may share an answer that is kept, whatever the deadline of the first.
        begin_by = place.begin_by if answer.cache is None else math.inf
        answer.sent = place.sent
        streams: list[AnswerStream] = []
        try:
            for index, one in enumerate(requests):
                streams.append(self._open(version, index, one, answer, begin_by))
        except BaseException:
            for stream in streams:
                stream.close()
            place.end()
            raise

        def end(flight: Flight) -> None:
            place.end(finished=flight.error is None)
            ended(flight)

        return Flight(streams, ended=end)

    def _open(
        self,
        version: ServedVersion,
        index: int,
        request: EngineRequest,
        answer: Answer,
        begin_by: float,
    ) -> AnswerStream:
        reasoning, body = version.builder.reasoning, answer.body
        calls = answer.tools is not None and answer.tools.tagged
        text = reasoning.text(request.prompt_ids, body.stops, chat=answer.chat, calls=calls)
        limit = answer.arrival + self._settings.timeout_seconds
        try:
            parts = version.service.open(request)
        except QueueFull as error:
            raise self._full(str(error)) from None
        except DeliberateError as error:
            raise as_api_error(error) from None
        ended = functools.partial(self.admission.note_answer, limit=request.max_new_tokens)
        names = None if answer.body.alternatives is None else version.builder.names
        return AnswerStream(
            index, parts, text, answer, limit, self._metrics, ended, names, begin_by=begin_by
        )


def _give_back(use: Use, prompt: int, flight: Flight) -> None:
    if flight.choices:  # of an answer that was given up it is not known what it took
        use.used(prompt + sum(one.tokens for one in flight.choices))


async def _whole(answer: Answer, reader: Reader, request: Request) -> Response:
    work = asyncio.create_task(reader.whole())
    gone = asyncio.create_task(_disconnect(request))
    await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not work.done():
        work.cancel()
        return Response(status_code=499)  # nobody reads it
    made = JSONResponse(answer.whole(work.result(), now() - answer.arrival))
    answer.sent()  # but for one write
    return made


async def _events(answer: Answer, reader: Reader) -> AsyncIterator[str]:
    """The server-sent events of a stream; choices as their tokens come."""
    if answer.chat:
        for index in range(answer.body.n):
            yield _event(answer.opening(index))
    finished: set[int] = set()
    events = ""
    try:
        while pieces := await reader.ready():
            chunks = itertools.chain.from_iterable(
                answer.chunks(one.index, one.text, one.finish, one.tokens, one.reasoning)
                for one in pieces
            )
            events = "".join(map(_event, chunks))
            finished.update(one.index for one in pieces if one.finish is not None)
            if len(finished) == answer.body.n:
                break  # the last text is sent with what closes the stream: each write takes time
            if events:
                yield events
            events = ""
        done = await reader.whole()
    except ApiError as error:
        yield events + _event({"error": {"message": error.message, "type": error.kind}})
        return
    options = answer.body.stream_options
    usage = options is not None and options.include_usage
    events += _event(answer.closing(done, now() - answer.arrival, usage=usage))
    yield events + "data: [DONE]\n\n"
    answer.sent()


class _EventResponse(StreamingResponse):
    """A stream of events that closes what it holds, even where its client went before it began."""

    def __init__(self, events: AsyncIterator[str], held: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _event(body: dict[str, Any]) -> str:
    return f"data: {_encode(body)}\n\n"


async def _disconnect(request: Request) -> None:
    """Returns once the client has gone; its body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
