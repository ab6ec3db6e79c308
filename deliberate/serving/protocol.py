"""Bodies of requests, as OpenAI's clients send them, and what this server adds to them.

A field that is not listed here is refused by name, since a setting that is silently left out gives
an answer that nobody asked for. Fields of OpenAI's that say nothing here are taken at the value
that changes nothing (``frequency_penalty=0``) and refused at others.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from deliberate.serving.fields import Strict, Text
from deliberate.serving.logprobs import MOST
from deliberate.serving.tools import NamedTool, Tool, ToolCall

Alternatives = Annotated[int, Field(ge=0, le=MOST)]


class StreamOptions(Strict):
    """What a stream has beside the text.

    Attributes:
        include_usage: a last chunk with the token counts.
        include_depth: in every chunk's choice ``token_depths``: ``[text, layer]`` of each token.
    """

    include_usage: bool = False
    include_depth: bool = False


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is; only `data:` URLs are read, see `deliberate.serving.images`."""

    url: Text
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    """An image in a message's content."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    """One turn of a chat.

    Attributes beside OpenAI's:
        tool_calls: of an assistant; its content may then be null.
        tool_call_id: of a tool's result.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    @model_validator(mode="after")
    def _is_of_its_role(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"tool_calls in a message of role {self.role}: only assistants call")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to messages of role tool, which need one")
        if self.images and self.role != "user":
            raise ValueError(f"image_url in a message of role {self.role}: only users show images")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: a message needs a text, unless it has tool_calls")
        return self


class JsonSchema(Strict):
    """A schema under its name, as OpenAI's clients give it."""

    name: Text
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """``text``, ``json_object`` or ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type json_schema, and with no other")
        return self


class Budget(Strict):
    """How long an answer may take, from its arrival on: one of the two.

    Attributes:
        ms_per_token: mean over the answer, prompt included.
        deadline_ms: of the whole answer.
    """

    ms_per_token: float | None = Field(default=None, gt=0.0)
    deadline_ms: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _is_one(self) -> Budget:
        if (self.ms_per_token is None) == (self.deadline_ms is None):
            raise ValueError("give ms_per_token or deadline_ms, one of the two")
        return self


class NvExt(Strict):
    """NIM's extension, as far as it is served."""

    max_thinking_tokens: int | None = Field(default=None, ge=-1)


class CustomParams(Strict):
    """SGLang's parameters of logit processors, as far as they are served."""

    thinking_budget: int | None = Field(default=None, ge=-1)


class Generation(Strict):
    """What both kinds of completion take.

    Attributes beside OpenAI's:
        top_k, min_p, repetition_penalty: of the sampling, as in vLLM.
        fidelity: dense, exact, threshold, certified or budget; the server's own by default, and
            budget where there is one.
        thresholds: fidelity threshold: least confidence to exit early.
        risk, epsilon, delta: fidelity certified: which certificate.
        latency_budget: a tier's name or a `Budget`; exits are chosen so that it is kept.
        deadline_ms: milliseconds from arrival; orders requests, and the answer says whether it
            was kept.
        priority: a higher number is more urgent.
        service_tier: ``priority`` for a client that waits for each token, ``flex`` for batch work;
            the scheduler ``feedback`` tells them apart.
        structured_outputs: ``{"regex": ...}``, ``{"choice": [...]}``, ``{"grammar": ...}`` or
            ``{"json_schema": ...}``.
        thinking_token_budget: most tokens of reasoning, -1 for no limit; also by the names of
            `deliberate.serving.reasoning`.
        reasoning_effort: the same as a share of the answer's limit.
        reasoning: a stop policy's name (``probe``, ``deer``, ``bands``, ...), or an object of
            policies and limits, as `AdaptiveModel.generate` takes them.
        votes: a number of chains of which the most frequent answer is given, or a rule.
    """

    model: Text
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=5.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0)
    n: int = Field(default=1, ge=1)
    seed: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    fidelity: Literal["dense", "exact", "threshold", "certified", "budget"] | None = None
    thresholds: float | list[float] | None = None
    risk: Literal["token", "accuracy"] | None = None
    epsilon: float | None = None
    delta: float | None = None
    latency_budget: Budget | Text | None = None
    deadline_ms: float | None = Field(default=None, gt=0.0)
    priority: int = 0
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    structured_outputs: dict[str, Any] | None = None
    thinking_token_budget: int | None = Field(default=None, ge=-1)
    reasoning_budget_tokens: int | None = Field(default=None, ge=-1)
    thinking_budget_tokens: int | None = Field(default=None, ge=-1)
    nvext: NvExt | None = None
    custom_params: CustomParams | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    reasoning: Text | dict[str, Any] | None = None
    votes: Annotated[int, Field(ge=1)] | Text | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream=true")
        return self

    @model_validator(mode="after")
    def _a_budget_is_of_its_fidelity(self) -> Generation:
        if self.latency_budget is not None and self.fidelity not in (None, "budget"):
            raise ValueError(
                f"latency_budget with fidelity {self.fidelity}: it is of fidelity budget"
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(given)

    @model_validator(mode="after")
    def _stops_are_texts(self) -> Generation:
        if len(self.stops) > 16 or not all(self.stops):
            raise ValueError("stop takes up to 16 texts that are not empty")
        return self


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``.

    Attributes:
        logprobs: the log-probability of every token, of the model's distribution where it was
            chosen, before temperature, penalties and constraints.
        top_logprobs: alternatives of each token, with theirs.
        tools, tool_choice: functions that the model may call or must.
        parallel_tool_calls: whether it may call several at once.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: list[Tool] | None = Field(default=None, max_length=64)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("response_format and structured_outputs are both given: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @model_validator(mode="after")
    def _tools_are_there(self) -> ChatRequest:
        names = [one.function.name for one in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if not names and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice without tools: give tools")
        if not names and self.parallel_tool_calls is not None:
            raise ValueError("parallel_tool_calls without tools: give tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is not in tools")
        for name, given in (
            ("response_format", self.response_format),
            ("structured_outputs", self.structured_outputs),
            ("stop", self.stop),
        ):
            if given is not None and self.callable_tools:
                raise ValueError(
                    f"{name} and tools: a call has its own form; leave one out, or give "
                    'tool_choice "none"'
                )
        return self

    @property
    def images(self) -> list[str]:
        """URLs of all of its images, in order."""
        return [url for message in self.messages for url in message.images]

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that this answer may call: what `tool_choice` leaves of `tools`."""
        tools, choice = self.tools or [], self.tool_choice
        if choice == "none":
            return []
        if isinstance(choice, NamedTool):
            return [one for one in tools if one.function.name == choice.function.name]
        return tools

    @property
    def alternatives(self) -> int | None:
        """As `Request.top_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, where one was given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def structured(self) -> dict[str, Any] | None:
        """As ``generate(structured=)`` takes it; None for free text."""
        if self.response_format is None or self.response_format.type == "text":
            return self.structured_outputs
        if self.response_format.json_schema is None:
            return {"json_schema": {"type": "object"}}
        return {"json_schema": self.response_format.json_schema.schema_}


class CompletionRequest(Generation):
    """Body of ``POST /v1/completions``; a prompt is a text or token ids.

    Attributes:
        add_special_tokens: whether a text gets what the model's tokenizer puts around a text, such
            as a begin token, as in vLLM.
        logprobs: the log-probability of every token, as in a chat, and so many alternatives.
    """

    images: ClassVar[tuple[str, ...]] = ()
    prompt: Text | Annotated[list[int], Field(min_length=1)]
    add_special_tokens: bool = True
    echo: Literal[False] | None = None
    logprobs: Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """As `Request.top_logprobs`."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, where one was given."""
        return self.max_tokens

    @property
    def structured(self) -> dict[str, Any] | None:
        """As ``generate(structured=)`` takes it; None for free text."""
        return self.structured_outputs
