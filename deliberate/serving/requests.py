"""From a client's body to requests of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deliberate.api.structured import StructuredOutput
from deliberate.data.prompts import has_chat_template
from deliberate.engine.constraints import LogitConstraint
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.engine.step_plan import Traffic
from deliberate.policies.budget import LatencyBudget
from deliberate.serving.errors import ApiError
from deliberate.serving.images import Eyes, takes_parts
from deliberate.serving.logprobs import TokenNames
from deliberate.serving.protocol import (
    Budget,
    ChatRequest,
    CompletionRequest,
    Generation,
    ImagePart,
    Message,
)
from deliberate.serving.reasoning import ModelReasoning
from deliberate.serving.settings import ServerSettings
from deliberate.serving.tools import NamedTool, ToolFormat
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

_TRAFFIC = {"priority": Traffic.INTERACTIVE, "flex": Traffic.BATCH}
# Characters of a prompt that are tokenized in some hundred microseconds.
_QUICK = 2000
_SPEC_FIELDS = ("fidelity", "thresholds", "risk", "epsilon", "delta")


class RequestBuilder:
    """Turns bodies into the engine's requests, for one model.

    Fast tokenizers change their own padding and truncation while they encode, so threads take
    turns (transformers issue 47085).

    Args:
        tokenizer: of the model.
        model_name: what clients must call it.
        generation_config: of the model: its end tokens.
        positions: the model's limit of tokens in all, or None.
        vocabulary: width of the model's logits.
        settings: limits.
        draw_seed: a seed for sampled requests without one.
        measured: whether it is known what passes take here; a budget needs that.
        config: of the model, which may state its tags.
        eyes: of a model that sees.

    Attributes:
        tokenizer: as given.
        end_tokens: of answers.
        names: of its tokens.
        reasoning: what is asked of the model's reasoning.
        tool_format: how calls are written; None where the chat template shows no tools.
    """

    def __init__(
        self,
        tokenizer: Any,
        model_name: str,
        generation_config: Any,
        positions: int | None,
        vocabulary: int,
        settings: ServerSettings,
        draw_seed: Callable[[], int],
        measured: Callable[[], bool] = lambda: True,
        config: Any = None,
        eyes: Eyes | None = None,
    ) -> None:
        if eyes is not None and not has_chat_template(tokenizer):
            tokenizer.chat_template = eyes.chat_template  # older processors keep it to themselves
        self.tokenizer = tokenizer
        self._in_parts = eyes is not None and takes_parts(self._render)
        self.names = TokenNames(tokenizer)
        self.tool_format = ToolFormat.of(self._render) if has_chat_template(tokenizer) else None
        self._name = model_name
        self._eyes = eyes
        self.end_tokens = end_tokens(generation_config, tokenizer)
        self._positions = positions
        self._vocabulary = vocabulary
        self._settings = settings
        self._draw_seed = draw_seed
        self._measured = measured
        self._lock = threading.Lock()
        self.reasoning = ModelReasoning.of(
            tokenizer,
            config,
            self.end_tokens,
            vocabulary,
            tags=settings.reasoning_tags,
            default=settings.thinking_token_budget,
        )

    def prompt(self, body: ChatRequest | CompletionRequest) -> list[int]:
        """Token ids of what the model continues.

        Raises:
            ApiError: no chat template, or one that fails on these messages; too long a prompt.
        """
        if isinstance(body, CompletionRequest):
            if isinstance(body.prompt, list):
                return self._checked(body.prompt)
            with self._lock:
                special = body.add_special_tokens
                ids = self.tokenizer.encode(body.prompt, add_special_tokens=special)
                return self._checked(list(ids))
        if not has_chat_template(self.tokenizer):
            raise ApiError(400, f"model {self._name!r} has no chat template: use /v1/completions")
        if body.images and self._eyes is None:
            raise ApiError(
                400, f"image_url: model {self._name!r} reads text alone: leave the images out"
            )
        tools = [one.model_dump(exclude_none=True) for one in body.callable_tools] or None
        try:
            messages = [self._turn(one) for one in body.messages]
            with self._lock:
                text = self._render(messages, tools=tools, **body.chat_template_kwargs)
                ids = [] if body.images else self._encoded(text)
        except Exception as error:  # of the model's own template, in whatever way it fails
            raise ApiError(400, f"messages: the chat template refuses them: {error}") from None
        if self._eyes is not None and body.images:
            ids = self._eyes.prompt(text, body.images)
        return self._checked(ids)

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _turn(self, message: Message) -> dict[str, Any]:
        return _turn(message, in_parts=self._in_parts)

    def _render(self, messages: list[dict[str, Any]], **given: Any) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **given
            )
        )

    def _checked(self, ids: list[int]) -> list[int]:
        limit = self._settings.max_prompt_tokens
        if not ids:
            raise ApiError(400, "the prompt is empty: it needs at least one token")
        if len(ids) > limit:
            raise ApiError(400, f"a prompt of {len(ids)} tokens: this server takes {limit} at most")
        return ids

    def build(
        self, body: ChatRequest | CompletionRequest, arrival: float, most: int | None = None
    ) -> list[Request]:
        """One request for each of the `n` choices; choice i has the seed of the body plus i.

        Args:
            arrival: second of the engine's clock.
            most: tokens that an answer may have besides the settings' limit; None for that alone.

        Raises:
            ApiError: a value that this server does not allow, or the engine refuses.
        """
        prompt, limit = self.inputs(body, most)
        seed = self.seed_of(body)
        deadline = None if body.deadline_ms is None else arrival + body.deadline_ms / 1000
        try:
            spec = spec_of(body)
            seen = self._eyes.hold(prompt) if self._eyes is not None and body.images else ()
            return [
                Request(
                    prompt_ids=prompt,
                    max_new_tokens=limit,
                    spec=spec,
                    sampling=chooser(body, seed + index),
                    end_tokens=self.end_tokens,
                    constraint=self._constraint(body, prompt, limit),
                    priority=body.priority,
                    traffic=_TRAFFIC.get(body.service_tier or "auto", Traffic.STANDARD),
                    arrival=arrival,
                    deadline=deadline,
                    budget=_budget(body),
                    top_logprobs=body.alternatives,
                    seen=seen,
                )
                for index in range(body.n)
            ]
        except DeliberateError as error:
            raise ApiError(400, str(error)) from None

    def inputs(
        self, body: ChatRequest | CompletionRequest, most: int | None = None
    ) -> tuple[list[int], int]:
        """The prompt's ids, and the tokens that an output may have.

        Args:
            most: as of `build`.

        Raises:
            ApiError: as `build`.
        """
        self._check(body)
        prompt = self.prompt(body)
        limit = self._new_tokens(body, len(prompt))
        return prompt, limit if most is None else min(limit, most)

    def seed_of(self, body: ChatRequest | CompletionRequest) -> int:
        """Of what is sampled: the body's, or one that is drawn."""
        if body.seed is None and body.temperature > 0:
            return self._draw_seed()
        return body.seed or 0

    def quick(self, body: ChatRequest | CompletionRequest) -> bool:
        """Whether `build` takes well below a millisecond, so that no thread is worth its change.

        Not so for long texts, for grammars, and while a thread has the tokenizer.
        """
        if isinstance(body, ChatRequest):
            texts = [message.text for message in body.messages]
            if body.callable_tools or body.images:
                return False
        else:
            texts = [body.prompt] if isinstance(body.prompt, str) else []
        short = sum(map(len, texts)) <= _QUICK
        return short and body.structured is None and not self._lock.locked()

    def _constraint(
        self, body: ChatRequest | CompletionRequest, prompt: Sequence[int], limit: int
    ) -> LogitConstraint | None:
        """What the output must look like; every choice advances one of its own."""
        form: LogitConstraint | None = None
        chat = isinstance(body, ChatRequest)
        structured, calls = body.structured, False
        if isinstance(body, ChatRequest) and body.callable_tools:
            structured = {"grammar": self._tool_grammar(body)}
            calls = self.tool_format is not None and self.tool_format.tagged
        if structured is not None:
            with self._lock:
                form = StructuredOutput.of(structured).constraint(
                    self.tokenizer, self.end_tokens, self._vocabulary
                )
        return self.reasoning.constraint(body, prompt, limit, form, chat=chat, calls=calls)

    def _tool_grammar(self, body: ChatRequest) -> str:
        form = self.tool_format
        if form is None:
            raise ApiError(
                400,
                f"tools: the chat template of {self._name!r} does not show them to the model: use "
                "response_format for an answer that is JSON",
            )
        if body.parallel_tool_calls and not form.tagged:
            raise ApiError(
                400, f"parallel_tool_calls=true: {self._name!r} writes one call; leave it out"
            )
        return form.grammar(
            [one.function for one in body.callable_tools],
            required=body.tool_choice not in (None, "auto"),
            parallel=body.parallel_tool_calls is not False
            and not isinstance(body.tool_choice, NamedTool),
        )

    def _check(self, body: Generation) -> None:
        if body.model != self._name:
            raise ApiError(
                404,
                f"model {body.model!r} is not served here: it is {self._name!r}",
                "not_found_error",
            )
        if isinstance(body.latency_budget, str):
            _check_tier(body.latency_budget)
        if body.latency_budget is not None and not self._measured():
            # To measure takes seconds, for which every other request would wait.
            raise ApiError(
                400,
                "latency_budget: it was not measured what a pass takes here: run `deliberate bench "
                "cost` with this model once, and start the server again",
            )
        if body.service_tier in _TRAFFIC and self._settings.scheduler != "feedback":
            raise ApiError(
                400,
                f"service_tier={body.service_tier!r}: the scheduler {self._settings.scheduler!r} "
                "tells no tiers apart: use priority, or start the server with --scheduler feedback",
            )
        if body.n > self._settings.max_choices:
            raise ApiError(400, f"n={body.n}: at most {self._settings.max_choices} choices here")

    def _new_tokens(self, body: ChatRequest | CompletionRequest, prompt: int) -> int:
        wanted, most = body.limit, self._settings.max_new_tokens
        if wanted is not None and wanted > most:
            raise ApiError(400, f"max_tokens={wanted}: this server makes {most} at most")
        room = most if self._positions is None else self._positions - prompt
        if room < 1 or (wanted is not None and wanted > room):
            raise ApiError(
                400,
                f"a prompt of {prompt} tokens and max_tokens={wanted} exceed the model's "
                f"{self._positions} positions: shorten one of them",
            )
        return wanted if wanted is not None else min(room, self._settings.default_new_tokens, most)


def _turn(message: Message, *, in_parts: bool = False) -> dict[str, Any]:
    """A message as chat templates read it: arguments of calls are objects there.

    Args:
        in_parts: the template takes the content as a list of texts and images.
    """
    content: Any = message.text
    if in_parts:
        parts = message.content if isinstance(message.content, list) else [None]
        content = [
            {"type": "image"}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": message.text if part is None else part.text}
            for part in parts
        ]
    turn: dict[str, Any] = {"role": message.role, "content": content}
    turn |= message.model_dump(include={"tool_calls", "tool_call_id"}, exclude_none=True)
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        function["arguments"] = parse_json(function["arguments"], "arguments of a tool call")
    return turn


def spec_of(body: Generation) -> DecodingSpec:
    """How a body's answers are decoded.

    Raises:
        DeliberateError: a value that is not allowed.
    """
    given = {name: getattr(body, name) for name in _SPEC_FIELDS}
    return DecodingSpec(**{name: value for name, value in given.items() if value is not None})


def _check_tier(name: str) -> None:
    try:
        LatencyBudget.tier(name)
    except DeliberateError as error:
        raise ApiError(400, f"latency_budget: {error}") from None


def _budget(body: Generation) -> Any:
    """As `Request.budget` takes it."""
    if isinstance(body.latency_budget, Budget):
        return body.latency_budget.model_dump(exclude_none=True)
    return body.latency_budget


def chooser(body: Generation, seed: int) -> TokenChooser:
    """How logits become tokens: transformers' processors, in transformers' order."""
    processors = LogitsProcessorList()
    if body.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(body.repetition_penalty))
    sample = body.temperature > 0
    if sample:
        if body.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(body.temperature))
        if body.top_k:
            processors.append(TopKLogitsWarper(body.top_k))
        if body.top_p < 1.0:
            processors.append(TopPLogitsWarper(body.top_p))
        if body.min_p:
            processors.append(MinPLogitsWarper(body.min_p))
    return TokenChooser(processors, sample=sample, seed=seed)


def now() -> float:
    """The engine's clock."""
    return time.perf_counter()
