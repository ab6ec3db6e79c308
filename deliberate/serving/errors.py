"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line: value, what is allowed, what to do.
        kind: OpenAI's ``type``.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """With OpenAI's body."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(error_body(self.message, self.kind), self.status, headers)


def error_body(message: str, kind: str) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def api_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def http_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of what the framework refuses: no such path or method, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    made = ApiError(error.status_code, str(error.detail)).response()
    made.headers.update(error.headers or {})
    return made


async def invalid_body(_: Request, error: Exception) -> JSONResponse:
    """Handler of bodies that do not fit the protocol: 400, naming the first field at fault."""
    assert isinstance(error, RequestValidationError)
    return ApiError(400, describe(error.errors())).response()


def describe(errors: Sequence[Any]) -> str:
    """One line for pydantic's errors: unknown fields first; that it is no text comes last."""
    first = min(
        errors, key=lambda one: (one["type"] != "extra_forbidden", one["loc"][-1:] == ("str",))
    )
    unknown = first["type"] == "extra_forbidden"
    parts = [str(part) for part in first["loc"] if part != "body"]
    # Between the names pydantic puts the kinds that a field may have; the last of an unknown field
    # is the client's own word.
    own = parts[-1:] if unknown else []
    named = parts[:-1] if unknown else parts
    where = ".".join([part for part in named if not _is_kind(part)] + own)
    if unknown:
        return f"{where}: this server does not know the field; leave it out"
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _is_kind(part: str) -> bool:
    """Whether a part of pydantic's place is a kind, such as ``constrained-str`` or ``Budget``."""
    return part in _KINDS or part[:1].isupper() or "[" in part or "-" in part


_KINDS = frozenset({"str", "int", "float", "bool", "dict", "none"})
