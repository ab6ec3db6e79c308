"""The load ``reasoning`` of `deliberate bench serve`: random requests whose reasoning is limited.

Greedy and sampled, every fidelity that a limit may have, structured or free, one or several
choices, streamed or whole, chats and texts, with and without stop policies and votes; the limit
under each of its names. What must hold of every answer is checked: no choice reasons for more
tokens than it may, and none is empty.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from deliberate.utils.json_files import parse_json

_REGEX = r"[0-9]{1,4}"
_CHOICES = ("yes", "no", "unknown")
# Tokens between the tags at most, and the least limit of a whole answer.
_MOST_BUDGET, _LEAST_TOKENS = 64, 24
_POLICIES: tuple[Any, ...] = (
    "none",
    {"probe": {"chunk": 16}},
    {"cut": {"tokens": 24}},
    {"deer": {"switches": ["So", "Then", "She", "is"]}, "extensions": 1},
    {"give_up": {"window": 16, "every": 4}, "suppressed": True},
    {"rollback": {"window": 16, "gram": 2, "every": 4}},
)
_GROUP = 128  # tokens of all chains of a vote
_VOTES: tuple[Any, ...] = (
    2,
    {"adaptive": {"most": 5}},
    {"decided": {"most": 5}, "tokens": _GROUP},
    {"confidence": {"most": 5, "warm_up": 2}, "tokens": _GROUP},
    {"windows": {"window": 2, "most": 4}},
)
_EFFORTS = {"none": 0.0, "minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}


@dataclass(frozen=True)
class Sent:
    """One request.

    Attributes:
        path: of the route.
        body: as JSON.
        budget: tokens of reasoning that each choice may have.
        mode: for the counts, such as ``exact, sampled, streamed``.
    """

    path: str
    body: dict[str, Any]
    budget: int
    mode: str


@dataclass
class ReasoningCounts:
    """What a load has shown.

    Attributes:
        requests, choices: that were answered.
        limited: choices whose budget was used up.
        exceeded, empty, failed: descriptions of what must not be.
        modes: requests of each.
        seconds: of the load.
    """

    requests: int = 0
    choices: int = 0
    limited: int = 0
    exceeded: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """All that must not be."""
        return self.exceeded + self.empty + self.failed

    def line(self) -> str:
        """All of it, in one line."""
        return (
            f"reasoning: {self.requests} requests of {len(self.modes)} modes, {self.choices} "
            f"choices, {self.limited} at their limit; limit exceeded {len(self.exceeded)}, "
            f"answers empty {len(self.empty)}, failed {len(self.failed)}; {self.seconds:.0f} s"
        )


def draw(
    rng: random.Random, model: str, question: str, *, chat: bool, most: int, structured: bool = True
) -> Sent:
    """One random request.

    Args:
        rng: of the load.
        model: what the server calls it.
        question: of the request.
        chat: whether the server has a chat template; texts are sent beside chats.
        most: tokens of an answer.
        structured: whether answers of a given form are among them.
    """
    limit = rng.randint(_LEAST_TOKENS, max(_LEAST_TOKENS, most))
    body: dict[str, Any] = {"model": model, "n": rng.choice((1, 1, 1, 2, 3))}
    body["fidelity"] = rng.choice(("dense", "exact", "threshold"))
    if body["fidelity"] == "threshold":
        body["thresholds"] = rng.choice((0.5, 0.8, 0.95))
    sampled = rng.random() < 0.6
    body["temperature"] = rng.choice((0.5, 1.0, 1.5)) if sampled else 0
    if sampled:
        body["seed"] = rng.randrange(1 << 20)
        name, value = rng.choice((("top_p", 1.0), ("top_p", 0.9), ("top_k", 20), ("min_p", 0.05)))
        body[name] = value
    if rng.random() < 0.2:
        body["repetition_penalty"] = 1.2
    form = rng.choice(("free", "free", "regex", "choice", "json")) if structured else "free"
    forms: dict[str, dict[str, Any]] = {
        "regex": {"regex": _REGEX},
        "choice": {"choice": list(_CHOICES)},
        "json": {"json_schema": {"type": "object"}},
    }
    if form in forms:
        body["structured_outputs"] = forms[form]
    talks = chat and rng.random() < 0.7
    if talks:
        body["messages"] = [{"role": "user", "content": question}]
    else:
        body["prompt"] = question
    body["max_tokens"] = limit
    budget = _limit(rng, body, limit)
    chains = form == "free" and rng.random() < 0.3
    if chains:
        body["reasoning"] = rng.choice(_POLICIES)
        if sampled and rng.random() < 0.5:
            body |= {"n": 1, "votes": rng.choice(_VOTES)}
    body["stream"] = rng.random() < 0.5
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    path = "/v1/chat/completions" if talks else "/v1/completions"
    kind = ("votes" if "votes" in body else "policy") if chains else form
    words = (body["fidelity"], "sampled" if sampled else "greedy", kind)
    return Sent(path, body, budget, ", ".join(words))


def _limit(rng: random.Random, body: dict[str, Any], limit: int) -> int:
    """Adds a limit under one of its names; returns its tokens."""
    budget = rng.randint(0, _MOST_BUDGET)
    name = rng.choice(("thinking_token_budget", "nvext", "custom", "effort", "tokens", "tokens_2"))
    if name == "effort":
        body["reasoning_effort"] = rng.choice(list(_EFFORTS))
        return int(_EFFORTS[body["reasoning_effort"]] * limit)
    given: dict[str, dict[str, Any]] = {
        "thinking_token_budget": {"thinking_token_budget": budget},
        "nvext": {"nvext": {"max_thinking_tokens": budget}},
        "custom": {"custom_params": {"thinking_budget": budget}},
        "tokens": {"reasoning_budget_tokens": budget},
        "tokens_2": {"thinking_budget_tokens": budget},
    }
    body.update(given[name])
    return budget


def send(client: httpx.Client, sent: Sent, close_tag: str) -> tuple[list[int], list[str]]:
    """Tokens of reasoning and text of the answer of each choice.

    Raises:
        ValueError: the answer is an error, or not what was asked for.
    """
    if sent.body["stream"]:
        return _streamed(client, sent, close_tag)
    answer = client.post(sent.path, json=sent.body)
    if answer.status_code != httpx.codes.OK:
        raise ValueError(f"status {answer.status_code}: {answer.text[:200]}")
    made = answer.json()
    texts = [
        one["message"]["content"] if "message" in one else _after(one["text"], close_tag)
        for one in made["choices"]
    ]
    return _counted(sent, made, texts)


def _streamed(client: httpx.Client, sent: Sent, close_tag: str) -> tuple[list[int], list[str]]:
    texts = [""] * sent.body["n"]
    last: dict[str, Any] = {}
    with client.stream("POST", sent.path, json=sent.body) as answer:
        if answer.status_code != httpx.codes.OK:
            raise ValueError(f"status {answer.status_code}: {answer.read()[:200]!r}")
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line.endswith("[DONE]"):
                continue
            last = parse_json(line[6:], "an event of the server")
            for one in last.get("choices", ()):
                said = one.get("delta", {}).get("content", one.get("text"))
                texts[one["index"]] += said or ""
    if "prompt" in sent.body:
        texts = [_after(text, close_tag) for text in texts]
    return _counted(sent, last, texts)


def _counted(sent: Sent, made: dict[str, Any], texts: list[str]) -> tuple[list[int], list[str]]:
    facts, usage = made["deliberate"], made["usage"]
    counts = list(facts["reasoning_tokens"])
    if facts["thinking_token_budget"] != sent.budget:
        raise ValueError(f"limit {facts['thinking_token_budget']} in force, not {sent.budget}")
    if sum(counts) != usage["completion_tokens_details"]["reasoning_tokens"]:
        raise ValueError(f"{counts} tokens of reasoning, and {usage} in usage")
    # Of a vote all chains are counted, and of chains their probes.
    most = sent.body["n"] * sent.body["max_tokens"]
    if usage["completion_tokens"] > most and "reasoning" not in sent.body:
        raise ValueError(f"{usage['completion_tokens']} tokens of an answer")
    votes = sent.body.get("votes")
    group = votes.get("tokens") if isinstance(votes, dict) else None
    if group is not None and usage["completion_tokens"] > group:
        raise ValueError(f"{usage['completion_tokens']} tokens of a vote with {group}")
    for text in texts:
        if len(texts) != sent.body["n"] or not _fits(sent.body.get("structured_outputs"), text):
            raise ValueError(f"not of the form that was asked for: {text!r:.80}")
    return counts, texts


def _fits(form: dict[str, Any] | None, text: str) -> bool:
    """Whether a text, which its limit may have cut, is of a form."""
    if form is None:
        return True
    if "regex" in form:
        return re.fullmatch(_REGEX, text) is not None
    if "choice" in form:
        return any(choice.startswith(text) for choice in _CHOICES)
    return text.lstrip().startswith("{")


def _after(text: str, close_tag: str) -> str:
    """The answer within a text that has its reasoning in it."""
    return text.rsplit(close_tag, 1)[-1]


def run(
    url: str,
    sent: Sequence[Sent],
    *,
    close_tag: str = "</think>",
    clients: int = 8,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> ReasoningCounts:
    """Sends requests from several clients and counts what must not be."""
    counts, lock = ReasoningCounts(), threading.Lock()
    todo = iter(sent)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def work() -> None:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout) as client:
            while True:
                with lock:
                    one = next(todo, None)
                if one is None:
                    return
                try:
                    tokens, texts = send(client, one, close_tag)
                except (ValueError, KeyError, httpx.HTTPError) as error:
                    with lock:
                        counts.failed.append(f"{error}: {json.dumps(one.body)}")
                    continue
                with lock:
                    _note(counts, one, tokens, texts)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts.seconds = time.perf_counter() - began
    return counts


def _note(counts: ReasoningCounts, sent: Sent, tokens: list[int], texts: list[str]) -> None:
    counts.requests += 1
    counts.modes[sent.mode] = counts.modes.get(sent.mode, 0) + 1
    for count, text in zip(tokens, texts, strict=True):
        counts.choices += 1
        counts.limited += count == sent.budget
        if count > sent.budget:
            counts.exceeded.append(f"{count} of {sent.budget}: {json.dumps(sent.body)}")
        if not text.strip():
            counts.empty.append(f"{text!r}: {json.dumps(sent.body)}")
