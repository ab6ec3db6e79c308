"""One sequence of a batch while it is decoded: its tokens and where it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from deliberate.trace import GenerationTrace, TokenRecord


class DecodingSequence:
    """Tokens, counters and state of one sequence.

    Attributes:
        index: its place among the prompts.
        row: its row in the cache, which changes as others finish.
        prefix: ids that a logits processor sees before the generated ones.
        prompt_tokens: tokens before the first generated one, padding not counted.
        records: generated tokens; in exact mode those behind `verified` may be taken back.
        verified: how many from the front the full depth has confirmed.
        handed: how many have been given to the caller.
        blocked: waits to go deeper.
        waited: shallow passes of others since it was blocked.
        finished: its output is complete.
        scores: processed scores ``[1, V]`` of each token, where they are kept.
    """

    __slots__ = (
        "blocked",
        "finished",
        "handed",
        "index",
        "prefix",
        "prompt_tokens",
        "records",
        "row",
        "scores",
        "trace",
        "verified",
        "waited",
    )

    def __init__(self, index: int, prefix: list[int], prompt_tokens: int, num_layers: int) -> None:
        self.index = index
        self.row = index
        self.prefix = prefix
        self.prompt_tokens = prompt_tokens
        self.trace = GenerationTrace(num_layers, prompt_tokens)
        self.records: list[TokenRecord] = self.trace.records
        self.verified = 0
        self.handed = 0
        self.blocked = False
        self.waited = 0
        self.finished = False
        self.scores: list[object] = []

    @property
    def position(self) -> int:
        """Absolute position of the newest token."""
        return self.prompt_tokens + len(self.records) - 1

    def ids(self, count: int) -> list[int]:
        """Prefix and the first `count` generated tokens."""
        return self.prefix + [record.token for record in self.records[:count]]

    def confirm(self, index: int, rounds: int = 0) -> None:
        """The full depth chose the token at `index` too, after so many rounds of the gate."""
        self.records[index] = dataclasses.replace(self.records[index], verified=True, rounds=rounds)
        self.verified = index + 1

    def take_back(self, index: int) -> None:
        """Forgets the token at `index` and all after it."""
        self.trace.rejected += 1
        self.trace.discarded += len(self.records) - index
        del self.records[index:]
        del self.scores[index:]

    def conclude(self, limit: int, end_tokens: Collection[int]) -> bool:
        """Whether the output is complete, noting why."""
        last = self.records[-1]
        if last.token in end_tokens:
            self.trace.finish = "stop"
            return True
        return len(self.records) >= limit

    def fresh(self, exact: bool) -> list[int]:
        """Tokens that stand and have not been handed out yet."""
        end = self.verified if exact else len(self.records)
        tokens = [record.token for record in self.records[self.handed : end]]
        self.handed = end
        return tokens
