"""Strict JSON for dataclasses: what is read has exactly the declared keys and types."""

from __future__ import annotations

import json
import os
import tempfile
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints, is_typeddict

from deliberate.errors import DeliberateError

# Metadata of a dataclass field that results written before it existed lack; it needs a default.
ADDED = types.MappingProxyType({"added": True})
_SCALARS = {str: (str,), bool: (bool,), int: (int,), float: (float, int), types.NoneType: ()}


def encode(value: object, indent: int | None = None) -> str:
    """JSON text of dataclasses and plain containers; ASCII only, NaN and infinity refused."""
    return json.dumps(value, indent=indent, default=_fields_of, allow_nan=False)


def decode(hint: Any, text: str, source: str) -> Any:
    """Build `hint` (a dataclass) from JSON text.

    Raises:
        DeliberateError: one line naming `source` and the key, for text that is not JSON, a
            missing or unknown key, a wrong type, or a value that the dataclass refuses.
    """
    try:
        raw = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise DeliberateError(f"{source}: not valid JSON ({error}); truncated?") from error
    return _build(hint, raw, source, "")


def read_text(path: Path) -> str:
    """UTF-8 text of a file, or a one-line error."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DeliberateError(f"{path}: cannot be read ({reason})") from error


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary file beside `path`, then rename it into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp gives 0600; these files are for sharing
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _fail(source: str, key: str, problem: str) -> NoReturn:
    raise DeliberateError(f"{source}: {key + ': ' if key else ''}{problem}")


def _build(hint: Any, raw: Any, source: str, key: str) -> Any:
    if hint is Any:
        return raw
    if is_typeddict(hint) or is_dataclass(hint):
        return _build_record(hint, raw, source, key)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):  # only "X | None" occurs
        return None if raw is None else _build(arguments[0], raw, source, key)
    if origin is list:
        if not isinstance(raw, list):
            _fail(source, key, f"expected a list, found {type(raw).__name__}")
        if set(map(type, raw)) <= {arguments[0]}:  # long lists of plain values need no recursion
            return raw
        return [_build(arguments[0], item, source, f"{key}[{i}]") for i, item in enumerate(raw)]
    if origin is dict:
        if not isinstance(raw, dict):
            _fail(source, key, f"expected an object, found {type(raw).__name__}")
        kind, item = arguments
        try:
            return {kind(k): _build(item, v, source, _join(key, k)) for k, v in raw.items()}
        except DeliberateError:
            raise
        except ValueError:
            _fail(source, key, f"every key must be {kind.__name__}")
    if not isinstance(raw, _SCALARS[hint]) or (isinstance(raw, bool) and hint is not bool):
        _fail(source, key, f"expected {hint.__name__}, found {json.dumps(raw)[:60]}")
    return hint(raw)


def _build_record(hint: Any, raw: Any, source: str, key: str) -> Any:
    if not isinstance(raw, dict):
        _fail(source, key, f"expected an object, found {type(raw).__name__}")
    hints = get_type_hints(hint)
    version = getattr(hint, "schema_version", None)  # the default of such a field, if any
    if version is not None and raw.get("schema_version", version) != version:
        found = json.dumps(raw["schema_version"])[:60]
        _fail(source, key, f"schema_version is {found}, this version reads {version}")
    for name in raw:
        if name not in hints:
            _fail(source, _join(key, name), f"unknown key; known are {', '.join(hints)}")
    added = {f.name for f in fields(hint) if "added" in f.metadata} if is_dataclass(hint) else set()
    for name in hints:
        if name not in raw and name not in added:
            _fail(source, _join(key, name), "missing key")
    values = {n: _build(h, raw[n], source, _join(key, n)) for n, h in hints.items() if n in raw}
    if not is_dataclass(hint):
        return values
    try:
        return hint(**values)  # type: ignore[operator]
    except ValueError as error:
        _fail(source, key, str(error))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
