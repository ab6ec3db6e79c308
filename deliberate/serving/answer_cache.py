"""Answers that were given before: in this process first, then in Redis, where it is set up.

Only an answer that is determined by its request is kept: greedy, or sampled with a seed, and
without a latency budget. The key is a hash of the model's weights, exits, policy and settings, of
the tokens of the prompt, and of every field of the request but those that do not change the answer,
so that a field of a later release counts too. Redis is an extra chance, never a condition: it is
given a fraction of a second, and after an error none for a while.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cachetools import TTLCache

from deliberate.engine.request import Request
from deliberate.serving.answers import Choice, Depth
from deliberate.serving.metrics import CacheCounts
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

logger = logging.getLogger(__name__)
Body = ChatRequest | CompletionRequest
# Fields that do not change the tokens of an answer, or that the prompt's tokens stand for.
_INCIDENTAL = frozenset(
    {
        "deadline_ms",
        "messages",
        "metadata",
        "priority",
        "service_tier",
        "prompt",
        "stream",
        "stream_options",
        "user",
    }
)
_PREFIX = "deliberate:answer:"
# Seconds that Redis is given, and for which it is not tried after an error.
_PATIENCE = 0.05
_REST = 5.0


class AnswerCache:
    """Keeps the answers of determined requests.

    Args:
        entries: answers that are kept in this process; the least recently used goes first.
        seconds: for which an answer is kept, here and in Redis.
        redis_url: of a Redis that several servers share; None for none.
        clock: seconds, monotonic.

    Attributes:
        counts: of look-ups.

    Raises:
        DeliberateError: a limit that is not allowed, or no client for Redis.
    """

    def __init__(
        self,
        *,
        entries: int = 1024,
        seconds: float = 3600.0,
        redis_url: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if entries < 1 or not seconds > 0:
            raise DeliberateError(
                f"a cache of {entries} entries for {seconds} s: at least 1 entry and more than 0 s"
            )
        self.counts = CacheCounts()
        self._kept: TTLCache[str, str] = TTLCache(entries, seconds, clock)
        self._seconds = seconds
        self._clock = clock
        self._redis = None if redis_url is None else _client(redis_url)
        self._try_redis_at = 0.0
        self._writes: set[asyncio.Task[None]] = set()

    def key(self, body: Body, requests: Sequence[Request], identity: str) -> str | None:
        """What an answer is kept under; None where it is not determined by its request.

        Args:
            body: as the client sent it, with its fidelity.
            requests: made of it.
            identity: of the model that answers.
        """
        if body.temperature > 0 and body.seed is None:
            return None
        if requests[0].budget is not None:
            return None
        if body.stream_options is not None and body.stream_options.include_depth:
            return None  # texts are kept, not those of the single tokens
        if body.alternatives is not None:
            return None
        fields = {
            "identity": identity,
            "kind": type(body).__name__,
            "prompt": _lasting(requests[0]),
            "limit": requests[0].max_new_tokens,
            "fields": body.model_dump(mode="json", by_alias=True, exclude=set(_INCIDENTAL)),
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    async def get(self, key: str) -> list[Choice] | None:
        """The choices that are kept under a key."""
        text = self._kept.get(key)
        if text is not None:
            self.counts.local += 1
            return _choices(text)
        text = await self._ask_redis("get", _PREFIX + key)
        if text is None:
            return None
        try:
            found = _choices(text)
        except (ValueError, TypeError, KeyError):
            self._failed(f"the value of {key} in Redis cannot be read: the answer is decoded")
            return None
        self.counts.redis += 1
        self._kept[key] = text if isinstance(text, str) else text.decode()
        return found

    def put(self, key: str, choices: Sequence[Choice]) -> None:
        """Keeps choices; Redis gets them in the background."""
        if any(one.depth is None for one in choices):
            return  # cut off: not what the request determines
        text = json.dumps([asdict(one) for one in choices], ensure_ascii=False)
        self._kept[key] = text
        if self._redis is not None:
            task = asyncio.create_task(self._write(key, text))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _write(self, key: str, text: str) -> None:
        await self._ask_redis("set", _PREFIX + key, text, px=max(1, round(1000 * self._seconds)))

    async def _ask_redis(self, name: str, *args: Any, **how: Any) -> Any:
        if self._redis is None or self._clock() < self._try_redis_at:
            return None
        try:
            async with asyncio.timeout(_PATIENCE):
                return await getattr(self._redis, name)(*args, **how)
        except Exception as error:  # of whatever kind: it must not become the request's
            self._failed(f"Redis is not asked for {_REST:g} s: {type(error).__name__}: {error}")
            self._try_redis_at = self._clock() + _REST
            return None

    def _failed(self, text: str) -> None:
        self.counts.errors += 1
        logger.warning(text)


def _lasting(request: Request) -> list[int | str]:
    """A prompt's ids, with images by what they are: their ids are of this process alone."""
    starts = {run.first: run.key for run in request.seen}
    within = {run.first + at for run in request.seen for at in range(len(run.rows))}
    return [starts.get(one, -1) if one in within else one for one in request.prompt_ids]


def _client(url: str) -> Any:
    try:
        from redis.asyncio import Redis
    except ImportError:
        from deliberate.installation import install_extra

        raise DeliberateError(f"--redis needs redis: {install_extra('redis')}") from None
    try:
        return Redis.from_url(url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE)
    except ValueError as error:
        raise DeliberateError(f"--redis {url}: {error}") from None


def _choices(text: str | bytes) -> list[Choice]:
    made = parse_json(text if isinstance(text, str) else text.decode(), "an answer in Redis")
    return [Choice(**one | {"depth": Depth(**one["depth"])}) for one in made]
