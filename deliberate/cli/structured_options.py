"""The options of `deliberate generate` that say what its answer must look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deliberate.utils.errors import DeliberateError


def structured_argument(
    json_schema: Path | None,
    regex: str | None,
    choice: Sequence[str] | None,
    grammar: Path | None,
) -> dict[str, Any] | None:
    """The argument ``structured`` of `generate`; None where no option is given.

    Raises:
        DeliberateError: two of them, or a file that cannot be read.
    """
    given: dict[str, Any] = {}
    if json_schema is not None:
        given["json_schema"] = _text("--json-schema", json_schema)
    if regex is not None:
        given["regex"] = regex
    if choice:
        given["choice"] = list(choice)
    if grammar is not None:
        given["grammar"] = _text("--grammar", grammar)
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DeliberateError(f"{options} describe the answer twice: give one of them")
    return given or None


def _text(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DeliberateError(f"{option} {path} cannot be read: {reason}") from error
