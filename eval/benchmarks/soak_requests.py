"""What `deliberate bench soak` sends: well-formed requests, and faults that must harm no other."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from deliberate.data.prompts import PROMPT
from deliberate.data.word_problems import word_problems

# Kinds of requests, each with its share.
WELL = {"whole": 6.0, "streamed": 6.0, "several": 1.0, "structured": 1.5, "sampled": 2.0}
FAULTS = {
    "disconnect": 3.0,  # the client goes away after a few tokens
    "not json": 0.5,
    "unknown field": 0.5,
    "wrong type": 0.5,
    "nan": 1.0,  # in a bias, a temperature, a threshold
    "huge": 1.0,  # 10^9 tokens, or a prompt beyond the limit
    "grammar": 1.0,  # a regex, a grammar or a schema that cannot be
    "token": 0.5,  # ids outside the vocabulary
}
REFUSED = (400, 404, 411, 413, 422)
"""Statuses that a faulty request may be answered with."""


@dataclass(frozen=True)
class SoakRequest:
    """One request.

    Attributes:
        kind: a key of `WELL` or of `FAULTS`.
        body: bytes as they are sent.
        stream: whether the answer is a stream.
        choices: answers that it must have.
    """

    kind: str
    body: bytes
    stream: bool = False
    choices: int = 1

    @property
    def well_formed(self) -> bool:
        """It must be answered."""
        return self.kind in WELL


class SoakRequests:
    """Random requests, the same for the same seed.

    Args:
        model: what the server calls it.
        seed: of the draws.
        faults: share of faulty requests, from 0 to 1.
        structured: whether answers of a given form are among them (extra `structured`).
    """

    def __init__(self, model: str, seed: int, faults: float, structured: bool) -> None:
        self._dice = random.Random(seed)
        self._model = model
        self._faults = faults
        self._prompts = [
            PROMPT.format(question=one.question) for one in word_problems("test", size=256)
        ]
        self._well = {name: w for name, w in WELL.items() if structured or name != "structured"}

    def draw(self) -> SoakRequest:
        """The next one."""
        dice = self._dice
        kinds = FAULTS if dice.random() < self._faults else self._well
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": dice.choice(self._prompts),
            "max_tokens": dice.randint(1, 64),
            "temperature": 0,
            "fidelity": dice.choice(("dense", "exact", "threshold")),
        }
        if kind in WELL:
            return self._well_formed(kind, body)
        return self._faulty(kind, body)

    def _well_formed(self, kind: str, body: dict[str, Any]) -> SoakRequest:
        dice = self._dice
        stream, choices = kind == "streamed", 1
        if kind == "several":
            choices = body["n"] = dice.randint(2, 4)
        elif kind == "structured":
            forms: list[dict[str, Any]] = [
                {"regex": "[0-9]{1,6}"},
                {"choice": ["yes", "no"]},
                {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            ]
            body["structured_outputs"] = dice.choice(forms)
        elif kind == "sampled":
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": dice.randrange(1000)}
            stream = dice.random() < 0.5
        if stream:
            body["stream"] = True
        return SoakRequest(kind, json.dumps(body).encode(), stream, choices)

    def _faulty(self, kind: str, body: dict[str, Any]) -> SoakRequest:
        dice = self._dice
        if kind == "disconnect":
            made = body | {"stream": True, "max_tokens": 256}
            return SoakRequest(kind, json.dumps(made).encode(), True)
        if kind == "not json":
            whole = json.dumps(body).encode()
            broken = (whole[:-7], b"", b"\xff\xfe{}", whole + b"}")
            return SoakRequest(kind, dice.choice(broken))
        nan, grammar = float("nan"), "structured_outputs"
        changes: dict[str, list[dict[str, Any]]] = {
            "unknown field": [{"colour": "red"}, {"logit_bias": {"5": -100}}],
            "wrong type": [{"n": "two"}, {"prompt": {"a": 1}}, {"max_tokens": 1.5}, {"stop": 3}],
            "nan": [
                {"logit_bias": {"5": nan}},
                {"temperature": nan},
                {"fidelity": "threshold", "thresholds": [nan, nan]},
                {"top_p": -nan},
            ],
            "huge": [
                {"max_tokens": 10**9},
                {"n": 10**6},
                {"prompt": "apples " * 40_000},
                {"max_tokens": 10**30},
            ],
            "grammar": [
                {grammar: {"regex": "(((("}},
                {grammar: {"grammar": "root ::= nothing"}},
                {grammar: {"json_schema": {"type": "no such type"}}},
                {grammar: {"odd": 1}},
            ],
            "token": [{"prompt": [10**9]}, {"prompt": [-1]}, {"prompt": []}],
        }
        return SoakRequest(kind, json.dumps(body | dice.choice(changes[kind])).encode())
