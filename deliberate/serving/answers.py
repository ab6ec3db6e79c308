"""From an answer's tokens to the bodies that OpenAI's clients read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deliberate.policies.controller_settings import BudgetReport
from deliberate.serving import logprobs
from deliberate.serving.protocol import ChatRequest, CompletionRequest
from deliberate.serving.text import TokenText
from deliberate.serving.tool_calls import ToolReader
from deliberate.serving.tools import ToolFormat
from deliberate.trace import GenerationTrace

Body = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Depth:
    """Where the tokens of an answer were chosen.

    Attributes:
        num_layers: of the model.
        layers_per_token: calls of a layer over tokens.
        exit_layers: of each token the layer after which it was chosen.
        drafted, rejected: tokens drafted at an exit, and those that full depth rejected.
    """

    num_layers: int
    layers_per_token: float
    exit_layers: list[int]
    drafted: int
    rejected: int

    @classmethod
    def of(cls, trace: GenerationTrace | None) -> Depth | None:
        """Of a trace; None where there is none."""
        if trace is None:
            return None
        return cls(
            trace.num_layers,
            trace.layers_per_token,
            list(trace.exit_layers),
            trace.drafted,
            trace.rejected,
        )


@dataclass
class Choice:
    """One answer of a request, once it is complete.

    Attributes:
        index: among the `n`.
        text: without stop strings and special tokens.
        finish: "stop" or "length".
        tokens: that were made for it.
        depth: where they were chosen; None where the answer was cut off.
        budget: how it stood to its latency budget; None without one, or where it was cut off.
        made: its tokens, where their log-probabilities are asked for.
        reasoning: text of its reasoning, where that is handed out apart; else None.
        reasoning_tokens: between the tags.
    """

    index: int
    text: str
    finish: str
    tokens: int
    depth: Depth | None
    budget: BudgetReport | None = None
    made: Sequence[TokenText] | None = None
    reasoning: str | None = None
    reasoning_tokens: int = 0


@dataclass
class Answer:
    """What all bodies of one response share.

    Attributes:
        body: of the request.
        prompt_tokens: of it.
        arrival: second of the engine's clock.
        version: number of the version that decodes it; None without a registry. Not the version
            itself, whose weights would live as long as whatever a client that went away has left.
        id, created: of the response.
        tools: how the calls of tools are written that it may have; None: it may have none.
        cache: "hit", "shared" (with an equal request on its way) or "miss"; None where it was not
            looked up.
        reasoning_budget: tokens of reasoning that each choice may have; None: no limit.
        chains: what is told of the chains of reasoning, where the body asks for them.
        sent: called once all of it was handed to the connection.
    """

    body: Body
    prompt_tokens: int
    arrival: float
    version: int | None
    id: str = ""
    tools: ToolFormat | None = None
    cache: str | None = None
    reasoning_budget: int | None = None
    chains: dict[str, Any] | None = None
    sent: Callable[[], None] = lambda: None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.id = self.id or f"{prefix}-{secrets.token_hex(12)}"
        self._readers: dict[int, ToolReader] = {}

    @property
    def chat(self) -> bool:
        """Whether it answers a chat."""
        return isinstance(self.body, ChatRequest)

    @property
    def shows_depth(self) -> bool:
        """Whether its stream tells the layer of each token."""
        options = self.body.stream_options
        return options is not None and options.include_depth

    @property
    def shows_tokens(self) -> bool:
        """Whether its stream tells something of each token, of one without text too."""
        return self.shows_depth or self.body.alternatives is not None

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
        }

    def whole(self, choices: list[Choice], seconds: float) -> dict[str, Any]:
        """The response that is not streamed."""
        made = []
        for one in choices:
            text: dict[str, Any] = {"text": one.text}
            finish = one.finish
            if self.chat:
                message, finish = self._message(one)
                text = {"message": message | _reasoning(one.reasoning)}
            text["logprobs"] = None if one.made is None else self._logprobs(one.made)
            made.append({"index": one.index, **text, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {
            "choices": made,
            "usage": self.usage(choices),
            "deliberate": self.facts(choices, seconds),
        }

    def _message(self, choice: Choice) -> tuple[dict[str, Any], str]:
        """A chat's message, and why it ended."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if self.tools is None:
            return message, choice.finish
        reader = ToolReader(self.tools)
        content = reader.push(choice.text)[0] + reader.finish()[0]
        if not reader.calls:
            return message | {"content": content}, choice.finish
        message |= {"content": content or None, "tool_calls": reader.calls}
        return message, _finish(choice.finish, reader)

    def chunks(
        self,
        index: int,
        text: str,
        finish: str | None,
        tokens: Sequence[TokenText],
        reasoning: str = "",
    ) -> Iterator[dict[str, Any]]:
        """What a stream has of some more text of a choice.

        Args:
            finish: why the choice ends with it, or None.
            tokens: the text token by token, of which the client may want layers or
                log-probabilities.
            reasoning: text of the reasoning, before any of the answer.
        """
        if reasoning:
            own = [one for one in tokens if one.reasoning]
            yield self._piece(index, _reasoning(reasoning), None, own)
            tokens = [one for one in tokens if not one.reasoning]
        pieces: list[dict[str, Any]] = []
        if self.tools is not None:
            reader = self._readers.setdefault(index, ToolReader(self.tools))
            text, pieces = reader.push(text)
            if finish is not None:
                rest, last = reader.finish()
                text, pieces = text + rest, pieces + last
                finish = _finish(finish, reader)
        if text or (self.shows_tokens and tokens):
            yield self._piece(index, {"content": text}, None, tokens)
        for piece in pieces:
            yield self._piece(index, {"tool_calls": [piece]}, None, ())
        if finish is not None:
            yield self._piece(index, {}, finish, ())

    def _piece(
        self, index: int, delta: dict[str, Any], finish: str | None, tokens: Sequence[TokenText]
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta}
        if not self.chat:
            content = {"text": delta.get("content", "")}
        if self.shows_depth and tokens:
            content["token_depths"] = [[one.text, one.layer] for one in tokens]
        if self.body.alternatives is not None:
            content["logprobs"] = self._logprobs(tokens) if tokens else None
        return self._chunk([{"index": index, **content, "finish_reason": finish}])

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        known = [one for one in tokens if one.logprobs is not None and not one.reasoning]
        entries = [one.logprobs for one in known if one.logprobs is not None]
        if self.chat:
            return logprobs.chat(entries)
        return logprobs.completion(entries, [one.offset for one in known])

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a chat's choice, which names the role."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "finish_reason": None}])

    def closing(self, choices: list[Choice], seconds: float, *, usage: bool) -> dict[str, Any]:
        """The last piece of a stream: no choices, but what the answer took."""
        extra: dict[str, Any] = {"deliberate": self.facts(choices, seconds)}
        if usage:
            extra["usage"] = self.usage(choices)
        return self._chunk([]) | extra

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """Counts of tokens, as OpenAI gives them."""
        tokens = sum(one.tokens for one in choices)
        reasoning = sum(one.reasoning_tokens for one in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def facts(self, choices: list[Choice], seconds: float) -> dict[str, Any]:
        """What this server adds: effective settings, depth, deadline."""
        depths = [one.depth for one in choices if one.depth is not None]
        tokens = sum(len(depth.exit_layers) for depth in depths)
        calls = sum(depth.layers_per_token * len(depth.exit_layers) for depth in depths)
        deadline = self.body.deadline_ms
        return {
            "fidelity": self.body.fidelity,
            "seconds": round(seconds, 6),
            "layers_per_token": round(calls / tokens, 4) if tokens else None,
            "num_layers": depths[0].num_layers if depths else None,
            "drafted": sum(depth.drafted for depth in depths),
            "rejected": sum(depth.rejected for depth in depths),
            "budgets": _budgets(choices),
            "thinking_token_budget": self.reasoning_budget,
            "reasoning_tokens": [one.reasoning_tokens for one in choices],
            "deadline_met": None if deadline is None else 1000 * seconds <= deadline,
            "cache": self.cache,
            "version": self.version,
            "exit_layers": [depth.exit_layers for depth in depths] if tokens <= 4096 else None,
            **(self.chains or {}),
        }


def _reasoning(text: str | None) -> dict[str, str]:
    """The reasoning under the names of vLLM, and of DeepSeek, SGLang and llama.cpp."""
    return {} if text is None else {"reasoning": text, "reasoning_content": text}


def _finish(finish: str, reader: ToolReader) -> str:
    return "tool_calls" if reader.calls and finish == "stop" else finish


def _budgets(choices: list[Choice]) -> list[dict[str, Any]] | None:
    """Of each choice that had a latency budget what was allowed, what it took, and whether it was
    kept; None where there was none."""
    reports = [one.budget for one in choices if one.budget is not None]
    if not reports:
        return None
    return [
        {
            "budget": one.budget,
            "met": one.met,
            "ms": round(1000 * one.seconds, 3),
            "allowed_ms": round(one.allowed_ms, 3),
        }
        for one in reports
    ]
