"""Strict JSON for dataclasses: what is read has exactly the declared keys and types."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

from deliberate.utils.json_files import ADDED as ADDED
from deliberate.utils.json_files import build
from deliberate.utils.json_files import read_text as read_text


def encode(value: object, indent: int | None = None) -> str:
    """JSON text of dataclasses and plain containers; ASCII only, NaN and infinity refused."""
    return json.dumps(value, indent=indent, default=_fields_of, allow_nan=False)


def decode(hint: Any, text: str, source: str) -> Any:
    """Build `hint` (a dataclass) from JSON text.

    Raises:
        DeliberateError: one line naming `source` and the key, for text that is not JSON, a
            missing or unknown key, a wrong type, or a value that the dataclass refuses.
    """
    return build(hint, text, source, complete=True)


def _fields_of(value: object) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        named = {field: getattr(value, field.name) for field in fields(value)}
        # An added field without a value is left out: earlier releases can read the file then.
        return {
            field.name: item
            for field, item in named.items()
            if item is not None or "added" not in field.metadata
        }
    raise TypeError(f"{type(value).__name__} does not go into JSON")
