"""The one reader of JSON: every file is parsed by these limits and checked against a schema.

A schema is a frozen dataclass (or a `TypedDict`) as pydantic reads it, in strict mode: no text for
a number, no 1.0 for 1, no true for 1, no NaN, no unknown key. Whatever a file holds, the reader
gives an object of the schema or raises `DeliberateError` with one line that names file and key.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import typing_extensions
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator

from deliberate.utils.errors import DeliberateError

T = TypeVar("T")

ADDED = types.MappingProxyType({"added": True})
"""Metadata of a dataclass field that files written before it existed lack; it needs a default."""

OrInfinity = Annotated[
    float, WrapValidator(lambda value, read: math.inf if value is None else read(value))
]
"""A number that is stored as null where it is infinite."""

MAX_NESTING = 64
"""Objects and lists inside one another; our own files have at most ten."""
_MOST_DIGITS = 20  # of a whole number: 64 bits
_FOUND = 60  # characters of a wrong value that an error shows
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "string": "str",
    "tuple": "a list",
    "list": "a list",
    "dict": "an object",
    "mapping": "an object",
    "dataclass": "an object",
    "model": "an object",
}


def parse_json(text: str, source: str, *, finite: bool = True) -> Any:
    """Python's form of JSON text, within limits that keep every later step safe.

    Refused beside broken JSON: NaN and infinity, numbers of more than 64 bits, a key that occurs
    twice, nesting deeper than `MAX_NESTING`, halves of surrogate pairs.

    Args:
        finite: False lets NaN and infinity pass, which a training log may hold.

    Raises:
        DeliberateError: one line that starts with `source`.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant if finite else float,
            parse_int=_whole,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
        _check_nesting(value)
        if not text.isascii():
            text.encode("utf-8")
        if _LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DeliberateError(
            f"{source}: not valid JSON (half of a surrogate pair, \\ud800 to \\udfff)"
        ) from None
    except RecursionError:
        raise DeliberateError(f"{source}: not valid JSON ({_too_deep()})") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise DeliberateError(f"{source}: not valid JSON ({reason}); truncated?") from None
    return value


def read_text(path: str | Path) -> str:
    """UTF-8 text of a file, or a one-line error."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DeliberateError(f"{path}: cannot be read ({reason})") from None


def read_json(path: str | Path, *, finite: bool = True) -> Any:
    """`parse_json` of a file."""
    return parse_json(read_text(path), str(path), finite=finite)


def read(kind: type[T], path: str | Path, **how: Any) -> T:
    """An object of the schema `kind` from a file; `how` as in `build`."""
    return build(kind, read_text(path), str(path), **how)


def build(
    kind: type[T],
    text: str,
    source: str,
    *,
    complete: bool = False,
    finite: bool = True,
    others: Literal["forbid", "ignore", "allow"] = "forbid",
) -> T:
    """An object of the schema `kind` from JSON text.

    Args:
        kind: a dataclass or TypedDict.
        text: JSON.
        source: what errors start with: the file, and the line where it has many.
        complete: fields with a default must be there too, unless they are `ADDED`.
        finite: see `parse_json`; a number of the schema must be finite all the same.
        others: what becomes of keys that the schema does not have: an error, left out, or (in a
            TypedDict) kept.

    Raises:
        DeliberateError: one line that names `source` and the key, for text that is not JSON, a
            missing or unknown key, a wrong type, or a value that the schema refuses.
    """
    raw = parse_json(text, source, finite=finite)
    schema: Any = kind
    version = getattr(kind, "schema_version", None)  # the default of such a field, if any
    if version is not None and isinstance(raw, dict):
        found = raw.get("schema_version", version)
        if found != version or isinstance(found, bool):
            _fail(source, "", f"schema_version is {_show(found)}, this version reads {version}")
    try:
        # In a list, since pydantic takes a configuration only beside types that are none of ours.
        (value,) = _adapter(schema, others).validate_json(f"[{text}]")
    except ValidationError as error:
        _refuse(kind, error, source)
    if complete:
        _check_complete(value, raw, source, "")
    return value


def file_key(name: str) -> Any:
    """For ``Annotated``: the key under which files hold a field, where it is not the field's name.

    For files of earlier releases, whose words differ from today's.
    """
    return Field(alias=name)


def build_from(kind: type[T], raw: Any, source: str, **how: Any) -> T:
    """`build` for data that is already in Python's form, such as a part of a file."""
    try:
        text = json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "every number must be finite" if "JSON compliant" in str(error) else str(error)
        raise DeliberateError(f"{source}: cannot be JSON: {reason}") from None
    return build(kind, text, source, **how)


@functools.cache
def _adapter(
    kind: Hashable, others: Literal["forbid", "ignore", "allow"]
) -> TypeAdapter[list[Any]]:
    settings = ConfigDict(strict=True, extra=others, allow_inf_nan=False)
    return TypeAdapter(list[kind], config=settings)  # type: ignore[valid-type]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:_FOUND]!r} occurs twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(int(digits)) >= 1 << 64:
        raise ValueError(f"a number of {len(digits)} digits, at most 64 bits are read")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:_FOUND]} is too large for a number")
    return value


def _too_deep() -> str:
    return f"nested more than {MAX_NESTING} deep"


def _check_nesting(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(_too_deep())
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text[:_FOUND]


def _fail(source: str, key: str, problem: str) -> NoReturn:
    raise DeliberateError(f"{source}: {key + ': ' if key else ''}{problem}")


def _key(place: Sequence[str | int]) -> str:
    """``modes.dense.exits[1]`` of a place in a file."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text[:200]


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def _refuse(kind: Any, error: ValidationError, source: str) -> NoReturn:
    """One line for the first of pydantic's errors: unknown keys first, since a key that was
    renamed is also missing."""
    found = error.errors(include_url=False)
    first = min(found, key=lambda one: one["type"] not in _UNKNOWN)
    what, place = first["type"], first["loc"][1:]
    key = _key(place)
    if what in _UNKNOWN:
        known = _fields_at(kind, place[:-1])
        _fail(source, key, "unknown key" + (f"; known are {', '.join(known)}" if known else ""))
    if what in ("missing", "missing_argument"):
        _fail(source, key, "missing key")
    if what == "value_error":
        _fail(source, key, " ".join(str(first["ctx"]["error"]).split()))
    if place and place[-1] == "[key]":
        expected = _KINDS.get(what.split("_")[0], what)
        _fail(source, _key(place[:-2]), f"every key must be {expected}")
    if what == "enum":
        members = str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        named = f"{place[-1]} " if place and isinstance(place[-1], str) else ""
        shown = repr(first["input"])[:_FOUND]
        _fail(source, _key(place[:-1]), f"{named}{shown} is unknown; it is one of {members}")
    plain = _KINDS.get(what.split("_")[0])
    problem = f"expected {plain}" if plain else first["msg"]
    _fail(source, key, f"{problem}, found {_show(first['input'])}")


def _fields_at(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Names of the fields of the record at `place` inside `kind`; none where it is no record."""
    for step in place:
        kind = _without_none(kind)
        if _is_record(kind):
            kind = typing_extensions.get_type_hints(kind).get(str(step), Any)
        else:
            kind = get_args(kind)[-1 if get_origin(kind) is not tuple else 0]
    kind = _without_none(kind)
    return list(typing_extensions.get_type_hints(kind)) if _is_record(kind) else []


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (types.UnionType, Union):
        return get_args(kind)[0]
    return kind


def _is_record(kind: Any) -> bool:
    return typing_extensions.is_typeddict(kind) or is_dataclass(kind)


def _check_complete(value: Any, raw: Any, source: str, key: str) -> None:
    """Raises where `raw` lacks a field that `value` then took from its default."""
    if is_dataclass(value):
        for field in fields(value):
            inner = f"{key}.{field.name}" if key else field.name
            if field.name in raw:
                _check_complete(getattr(value, field.name), raw[field.name], source, inner)
            elif "added" not in field.metadata:
                _fail(source, inner, "missing key")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_complete(item, raw.get(str(name)), source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
        for number, item in enumerate(value):
            _check_complete(item, raw[number], source, f"{key}[{number}]")
