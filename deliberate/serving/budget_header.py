"""The latency budget of a request from its body or from the header ``x-latency-budget``."""

from __future__ import annotations

import re

from deliberate.serving.errors import ApiError
from deliberate.serving.protocol import Budget, ChatRequest, CompletionRequest

HEADER = "x-latency-budget"
_NUMBERED = re.compile(r"(ms_per_token|deadline_ms)\s*=\s*(\d+(?:\.\d+)?)")


def with_header(
    body: ChatRequest | CompletionRequest, header: str | None
) -> ChatRequest | CompletionRequest:
    """The body with the budget of the header, where that is given.

    Args:
        header: a tier's name, ``deadline_ms=200`` or ``ms_per_token=3``.

    Raises:
        ApiError: a header that is none of these, one that contradicts the body, or fidelity budget
            without a budget in either.
    """
    if header is not None:
        budget = _read(header.strip())
        if body.latency_budget not in (None, budget):
            raise ApiError(
                400,
                f"latency_budget and the header {HEADER}: {header!r} contradict each other: give "
                "one of them",
            )
        if body.fidelity not in (None, "budget"):
            raise ApiError(400, f"{HEADER} with fidelity {body.fidelity}: it is of fidelity budget")
        body = body.model_copy(update={"latency_budget": budget})
    if body.fidelity == "budget" and body.latency_budget is None:
        raise ApiError(
            400, f'fidelity budget needs latency_budget, {{"ms_per_token": 3}} say, or {HEADER}'
        )
    return body


def _read(text: str) -> Budget | str:
    if found := _NUMBERED.fullmatch(text):
        number = float(found[2])
        if number > 0:
            return Budget(**{found[1]: number})
    elif re.fullmatch(r"\w+", text):
        return text
    raise ApiError(400, f"{HEADER}: {text!r:.60} is no tier, deadline_ms=200 or ms_per_token=3")
