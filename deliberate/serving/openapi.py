"""What `/openapi.json` says of answers and limits: FastAPI knows bodies of requests only."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from deliberate.serving.settings import ServerSettings

Schema = dict[str, Any]


def _object(required: dict[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": required | optional, "required": sorted(required)}


def _or_null(kind: str) -> Schema:
    return {"type": [kind, "null"]}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TEXT, _WHOLE, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT}, param=_or_null("string"), code={})}
)
_FACTS = _object(
    {"fidelity": _TEXT, "seconds": _NUMBER},
    layers_per_token=_or_null("number"),
    num_layers=_or_null("integer"),
    drafted=_WHOLE,
    rejected=_WHOLE,
    budgets={
        "type": ["array", "null"],
        "items": _object(
            {"budget": _TEXT, "met": {"type": "boolean"}, "ms": _NUMBER, "allowed_ms": _NUMBER}
        ),
    },
    thinking_token_budget=_or_null("integer"),
    reasoning_tokens=_array(_WHOLE),
    deadline_met=_or_null("boolean"),
    cache=_or_null("string"),
    version=_or_null("integer"),
    exit_layers={"type": ["array", "null"], "items": _array(_WHOLE)},
    chains=_array({"type": "object"}),
    votes={"type": "object"},
)
_USAGE = _object(
    {"prompt_tokens": _WHOLE, "completion_tokens": _WHOLE, "total_tokens": _WHOLE},
    completion_tokens_details=_object({"reasoning_tokens": _WHOLE}),
)
# Its data is a chunk as OpenAI's clients read it, or "[DONE]".
_EVENT = _object({"data": _TEXT})
_CHOICE: dict[str, Schema] = {
    "index": _WHOLE,
    "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
}
_TOKEN = _object({"token": _TEXT, "logprob": _NUMBER, "bytes": _array(_WHOLE)})
_TOKENS = _array(_object(_TOKEN["properties"] | {"top_logprobs": _array(_TOKEN)}))
_CHAT_LOGPROBS = {"type": ["object", "null"], "properties": {"content": _TOKENS}}
_LOGPROBS = {
    "type": ["object", "null"],
    "properties": {
        "tokens": _array(_TEXT),
        "token_logprobs": _array(_NUMBER),
        "top_logprobs": _array({"type": "object", "additionalProperties": _NUMBER}),
        "text_offset": _array(_WHOLE),
    },
}
_CALL = _object(
    {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": _object({"name": _TEXT, "arguments": _TEXT}),
    }
)
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _or_null("string")},
    reasoning=_TEXT,
    reasoning_content=_TEXT,
    tool_calls=_array(_CALL),
)


def _content(kind: str, schema: Schema) -> Schema:
    return {kind: {"schema": schema}}


def _error(description: str) -> Schema:
    return {"description": description, "content": _content("application/json", _ERROR)}


def _completion(kind: str, choice: Schema) -> Schema:
    head = {"id": _TEXT, "object": {"const": kind}, "created": _WHOLE, "model": _TEXT}
    return _object(head | {"choices": _array(choice), "usage": _USAGE, "deliberate": _FACTS})


ERRORS: dict[int | str, Schema] = {
    "4XX": _error("The request is refused; the message names the field and what is allowed."),
    500: _error("The engine failed on this request."),
    503: _error("The server is going down, or its engine is dead or hangs."),
}


def completions(*, chat: bool) -> dict[int | str, Schema]:
    """Responses of either completion: whole or as server-sent events, or an error."""
    if chat:
        choice = _object({**_CHOICE, "message": _MESSAGE}, logprobs=_CHAT_LOGPROBS)
        whole = _completion("chat.completion", choice)
    else:
        choice = _object({**_CHOICE, "text": _TEXT}, logprobs=_LOGPROBS)
        whole = _completion("text_completion", choice)
    content = _content("application/json", whole) | _content("text/event-stream", _EVENT)
    return {200: {"description": "The answer.", "content": content}} | ERRORS


def health() -> dict[int | str, Schema]:
    """Responses of `/health`."""
    state = _object(
        {"status": _TEXT, "engine": {"type": "object"}, "restarts": _array({"type": "object"})}
    )
    body = _content("application/json", state)
    texts = {200: "Requests are decoded.", 503: "Draining, or the engine has failed or hangs."}
    return {code: {"description": text, "content": body} for code, text in texts.items()}


METRICS: dict[int | str, Schema] = {
    200: {"description": "Prometheus' text format.", "content": _content("text/plain", _TEXT)}
}


def state_limits(app: FastAPI, model_name: str, settings: ServerSettings) -> None:
    """Has the document name the model that is served, and this server's limits."""
    plain = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            document = copy.deepcopy(plain())
            for name in ("ChatRequest", "CompletionRequest"):
                fields = document["components"]["schemas"][name]["properties"]
                fields["model"]["enum"] = [model_name]
                fields["n"]["maximum"] = settings.max_choices
                for limit in ("max_tokens", "max_completion_tokens"):
                    for choice in fields.get(limit, {}).get("anyOf", ()):
                        if choice["type"] == "integer":
                            choice["maximum"] = settings.max_new_tokens
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
