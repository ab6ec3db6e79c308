"""How much each client may ask for: requests and tokens a minute, and requests at a time.

A client is its API key where keys are set, else its address. Requests and tokens are counted in
buckets that fill evenly over a minute, so that a client may use a minute's worth at once and then
continues at the even rate. Tokens are those of the prompt and those that the answer may have; what
the answer did not use is given back at its end.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

from cachetools import TTLCache

from deliberate.serving.errors import ApiError
from deliberate.serving.settings import QuotaSettings

# Clients that are remembered; of one that was not seen for two minutes all buckets are full.
_MOST_CLIENTS = 65536
_FORGET_SECONDS = 120.0


class _Bucket:
    """Something that fills up to `size` in a minute."""

    def __init__(self, size: int, now: float) -> None:
        self._size = size
        self._left = float(size)
        self._seen = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; 0 where it is."""
        self._fill(now)
        return max(0.0, amount - self._left) / self._size * 60.0

    def take(self, amount: float, now: float) -> None:
        """Takes so much, or gives it back where it is negative."""
        self._fill(now)
        self._left = min(self._left - amount, float(self._size))

    def _fill(self, now: float) -> None:
        passed, self._seen = max(0.0, now - self._seen), max(now, self._seen)
        self._left = min(float(self._size), self._left + passed * self._size / 60.0)


class _Client:
    def __init__(self, settings: QuotaSettings, now: float) -> None:
        self.requests = None if settings.requests is None else _Bucket(settings.requests, now)
        self.tokens = None if settings.tokens is None else _Bucket(settings.tokens, now)
        self.running = 0


class Quotas:
    """Counts what clients use; in the server's event loop only.

    Args:
        settings: limits of each client.
        clock: seconds, monotonic.
    """

    def __init__(
        self, settings: QuotaSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._clients: TTLCache[str, _Client] = TTLCache(_MOST_CLIENTS, _FORGET_SECONDS, clock)

    def enter(self, client: str) -> Use:
        """A request of a client begins; what is returned must be closed at its end.

        Raises:
            ApiError: 429, with the limit and the seconds after which to try again.
        """
        settings, now = self._settings, self._clock()
        known = self._clients.get(client) or _Client(settings, now)
        self._clients[client] = known  # remembered from now on
        if settings.concurrent is not None and known.running >= settings.concurrent:
            raise _refusal(f"{settings.concurrent} requests at a time", 1.0)
        if known.requests is not None:
            wait = known.requests.wait(1, now)
            if wait > 0:
                raise _refusal(f"{settings.requests} requests a minute", wait)
            known.requests.take(1, now)
        known.running += 1
        return Use(known, settings, self._clock)


class Use:
    """One request's part of its client's limits; closing it twice is as closing it once."""

    def __init__(
        self, client: _Client, settings: QuotaSettings, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._settings = settings
        self._clock = clock
        self._taken = 0
        self._closed = False

    def take(self, tokens: int) -> None:
        """It may come to so many tokens, prompt and answers.

        Raises:
            ApiError: 429 where the client has not so many left, 400 where it never has.
        """
        bucket, most = self._client.tokens, self._settings.tokens
        if bucket is None or most is None:
            return
        if tokens > most:
            raise ApiError(
                400,
                f"this request may come to {tokens} tokens: a client has {most} a minute here; "
                "shorten the prompt or max_tokens",
            )
        now = self._clock()
        wait = bucket.wait(tokens, now)
        if wait > 0:
            raise _refusal(f"{most} tokens a minute", wait)
        bucket.take(tokens, now)
        self._taken = tokens

    def used(self, tokens: int) -> None:
        """It came to so many tokens."""
        if self._client.tokens is not None and self._taken > tokens:
            self._client.tokens.take(tokens - self._taken, self._clock())
            self._taken = tokens

    def close(self) -> None:
        """It has ended."""
        if not self._closed:
            self._closed = True
            self._client.running -= 1


def client_of(authorization: str | None, address: str | None, *, keys: bool) -> str:
    """Who asks: by the API key where keys are set (a hash of it), else by the address."""
    if keys and authorization:
        return "key:" + hashlib.blake2b(authorization.encode(), digest_size=16).hexdigest()
    return f"address:{address or 'unknown'}"


def _refusal(limit: str, wait: float) -> ApiError:
    return ApiError(
        429,
        f"a client may have {limit} here: try again later",
        "rate_limit_error",
        retry_after=max(1, math.ceil(wait)),
    )
