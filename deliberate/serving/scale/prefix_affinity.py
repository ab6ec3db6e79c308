"""Which replicas have seen the beginning of a prompt: their KV blocks or answers may serve again.

A prompt is cut into chunks; the key of a chunk is a hash of everything up to its end, so that equal
keys mean equal beginnings. The newest keys are kept, each with the replicas that ran it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cachetools import LRUCache

from deliberate.utils.errors import DeliberateError

# Characters, or token ids, of a chunk, and chunks of a prompt that are told apart.
CHUNK_CHARACTERS, CHUNK_TOKENS = 256, 64
MOST_CHUNKS = 32


def prompt_text(body: Mapping[str, Any]) -> str | list[int]:
    """What an OpenAI body begins with: its prompt (text or token ids), or its messages in order.

    A body of another form gives an empty text: the replica that reads it says what is wrong.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(one, int) for one in prompt):
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ""
    whole = [one for one in messages if isinstance(one, dict)]
    return "".join(f"{one.get('role')}\0{one.get('content')}\0" for one in whole)


def prefix_keys(prompt: str | Sequence[int]) -> tuple[bytes, ...]:
    """A key for each chunk of a prompt's beginning; a last part of a chunk counts as one, too."""
    size = CHUNK_CHARACTERS if isinstance(prompt, str) else CHUNK_TOKENS
    digest, made = hashlib.blake2b(digest_size=12), []
    for start in range(0, min(len(prompt), MOST_CHUNKS * size), size):
        part = prompt[start : start + size]
        text = part if isinstance(part, str) else ",".join(map(str, part))
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        made.append(digest.digest())
    return tuple(made)


class PrefixDirectory:
    """The replicas that ran each beginning.

    Args:
        capacity: beginnings that are kept, the least recently used go first.

    Raises:
        DeliberateError: a capacity below 1.
    """

    def __init__(self, capacity: int = 65536) -> None:
        if capacity < 1:
            raise DeliberateError(f"prefix capacity {capacity} must be at least 1")
        self._seen: LRUCache[bytes, set[str]] = LRUCache(capacity)

    def note(self, keys: Sequence[bytes], name: str) -> None:
        """A prompt with these keys went to the replica."""
        for key in keys:
            self._seen.setdefault(key, set()).add(name)

    def matched(self, keys: Sequence[bytes], names: Collection[str]) -> dict[str, float]:
        """By name, the share of the chunks that the replica has seen from the first on."""
        if not keys:
            return {}
        made = dict.fromkeys(names, 0)
        still = set(names)
        for count, key in enumerate(keys, 1):
            still &= self._seen.get(key, set())
            if not still:
                break
            for name in still:
                made[name] = count
        return {name: count / len(keys) for name, count in made.items()}

    def forget(self, name: str) -> None:
        """A replica has gone; one that takes its place begins with an empty cache."""
        for key in list(self._seen):
            self._seen[key].discard(name)
