"""One sequence of a batch while it is decoded: its tokens and its state."""

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
        records: generated tokens; in exact mode those after the first `verified` may be
            rolled back.
        verified: how many from the front the full depth has chosen or confirmed.
        yielded: how many the caller has got.
        blocked: its newest token did not exit and needs a deep pass.
        waited: shallow passes of other sequences since it was blocked.
        finished: its output is complete.
        scores: processed scores ``[1, V]`` of each token, where they are kept.
    """

    __slots__ = (
        "blocked",
        "finished",
        "index",
        "prefix",
        "prompt_tokens",
        "records",
        "row",
        "scores",
        "trace",
        "verified",
        "waited",
        "yielded",
    )

    def __init__(self, index: int, prefix: list[int], prompt_tokens: int, num_layers: int) -> None:
        self.index = index
        self.row = index
        self.prefix = prefix
        self.prompt_tokens = prompt_tokens
        self.trace = GenerationTrace(num_layers, prompt_tokens)
        self.records: list[TokenRecord] = self.trace.records
        self.verified = 0
        self.yielded = 0
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

    def add(
        self,
        token: int,
        layer: int,
        confidence: float,
        seconds: float,
        *,
        verified: bool,
        rounds: int = 0,
    ) -> None:
        """Appends a token; the arguments are the fields of its `TokenRecord`."""
        self.records.append(TokenRecord(token, layer, confidence, seconds, verified, rounds))

    def draft(self, token: int, layer: int, confidence: float, seconds: float) -> None:
        """Appends a token that was chosen at an exit."""
        self.add(token, layer, confidence, seconds, verified=False)
        self.trace.drafted += 1

    def confirm(self, index: int, rounds: int = 0) -> None:
        """The full depth chose the token at `index` too, after this many deliberation rounds."""
        self.records[index] = dataclasses.replace(self.records[index], verified=True, rounds=rounds)
        self.verified = index + 1

    def roll_back(self, index: int) -> None:
        """Removes the token at `index`, a rejected draft, and all after it."""
        self.trace.rejected += 1
        self.trace.discarded += len(self.records) - index
        del self.records[index:]
        del self.scores[index:]

    def is_complete(self, limit: int, end_tokens: Collection[int]) -> bool:
        """Whether the output is complete; the trace says why."""
        last = self.records[-1]
        if last.token in end_tokens:
            self.trace.finish = "stop"
            return True
        return len(self.records) >= limit

    def take_accepted(self, exact: bool) -> list[int]:
        """Tokens accepted since the last call: verified ones where `exact`, else all."""
        end = self.verified if exact else len(self.records)
        tokens = [record.token for record in self.records[self.yielded : end]]
        self.yielded = end
        return tokens
