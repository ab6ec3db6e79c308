"""What passes between the front and a replica: a request, and its answer in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from deliberate.serving.scale.prefix_affinity import prefix_keys, prompt_text
from deliberate.serving.scale.replica_score import RequestSize
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

Headers = tuple[tuple[bytes, bytes], ...]
# Characters of a token, where only the text is known: the front has no tokenizer.
_CHARACTERS = 4


@dataclass(frozen=True)
class Call:
    """One HTTP request, whole.

    Attributes:
        method, path, query: of it.
        headers: names in lower case.
        body: bytes.
        client: address, or None.
        size: what it will ask of a replica.
        keys: of its prompt's beginning.
        streams: whether its answer comes in parts; where not, it passes in one message.
    """

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""
    client: tuple[str, int] | None = None
    size: RequestSize = field(default_factory=RequestSize)
    keys: tuple[bytes, ...] = ()
    streams: bool = False


@dataclass(frozen=True)
class Reply:
    """A part of an answer; the first one has the status.

    Attributes:
        status: of HTTP; None in a further part.
        headers: of the first part.
        body: bytes.
    """

    status: int | None = None
    headers: Headers = ()
    body: bytes = b""


class ReplicaLost(Exception):
    """The replica ended before its answer did."""


class Overloaded(Exception):
    """As many requests wait in front as may."""


class Replicas(Protocol):
    """What the front sends requests to."""

    def open(self, call: Call) -> AsyncIterator[Reply]:
        """The parts of an answer; closing it gives the request up.

        Raises:
            ReplicaLost: in iterating, the replica ended.
            Overloaded: in iterating, no replica takes it and too many wait.
        """
        ...

    async def metrics(self) -> dict[str, str]:
        """By name of the replica, its metrics in Prometheus' text form."""
        ...

    async def health(self) -> dict[str, dict[str, Any]]:
        """By name, what each replica that answers says of itself."""
        ...


def described(body: bytes, default_answer: int) -> tuple[RequestSize, tuple[bytes, ...], bool]:
    """Size and keys of a body, and whether it asks for a stream; what cannot be read is small and
    begins like nothing else."""
    try:
        read = parse_json(body.decode("utf-8"), "the body")
    except (DeliberateError, UnicodeDecodeError):
        return RequestSize(), (), False
    if not isinstance(read, dict):
        return RequestSize(), (), False
    prompt = prompt_text(read)
    tokens = len(prompt) // _CHARACTERS if isinstance(prompt, str) else len(prompt)
    limits = [read.get(name) for name in ("max_tokens", "max_completion_tokens")]
    given = [one for one in limits if isinstance(one, int) and one > 0]
    answer = min([*given, default_answer])
    size = RequestSize(max(1, tokens), max(1, answer))
    return size, prefix_keys(prompt), read.get("stream") is True
