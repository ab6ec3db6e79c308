"""What an unfinished run keeps, so that the same command goes on where it was stopped.

A partial file is JSON lines that are only ever appended. The first line states the settings and
their hash: a run goes on from a file of the same settings, and from no other. A last line that was
torn by a crash is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from deliberate.utils.errors import DeliberateError
from deliberate.utils.file_lock import try_lock
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_files import parse_json
from deliberate.utils.json_records import encode

FORMAT_VERSION = 1
AUTO = "auto"
# Letters of a hash in the name of a file that was set aside.
_SHORT = 8


class PartialFile:
    """An open partial file. Use it as a context manager: `remove` it once the run is complete.

    Args:
        path: where it is or will be; its folder is made.
        settings: whatever the kept lines depend on, JSON-ready.
        resume: ``"auto"`` (go on where the settings are the same, else start anew and set the
            other file aside), True (go on, or fail) or False (start anew).

    Attributes:
        lines: the objects that earlier runs kept.
        empty: nothing is kept.
        notice: what happened to an earlier file, in words; empty if there was none.

    Raises:
        DeliberateError: another run is writing the file, a line is damaged, or `resume` is true and
            there is nothing to go on from.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: str | bool = AUTO) -> None:
        self.path = path
        self.sha256 = json_sha256(settings)
        self.lines: list[dict[str, Any]] = []
        self.notice = ""
        self._settings = json.loads(json.dumps(settings))
        wanted = check_resume(resume)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            with path.open("rb") as file:  # before anything is renamed or removed
                self._lock(file)
        found = self._find(wanted)
        length = self._read() if found else 0
        if not found:
            path.unlink(missing_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8", newline="\n")
        self.empty = not self.lines
        self._lock(self._file)
        if found:
            self._file.truncate(length)
        else:
            head = {"partial": FORMAT_VERSION, "sha256": self.sha256, "settings": self._settings}
            self._write(head)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line, of plain values and dataclasses; the system has it when this returns."""
        self._write(line)
        self.empty = False

    def remove(self) -> None:
        """The run is complete, or what was kept is of no use."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self.empty:
            self.path.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(encode(dict(line)) + "\n")
        self._file.flush()

    def _lock(self, file: IO[Any]) -> None:
        """Two runs in one folder would mix their lines."""
        try:
            try_lock(file)
        except BlockingIOError:
            file.close()
            raise DeliberateError(
                f"another run is writing {self.path}: wait for it, or give another out=..."
            ) from None

    def _find(self, resume: bool | None) -> bool:
        """Whether there is a file to go on from; one of other settings is set aside."""
        stated = _head(self.path)
        own = self._aside(self.sha256)
        if resume is False:
            if stated is not None:
                self.notice = f"{self.path} was discarded (resume=false)"
            return False
        if stated is not None and stated.get("sha256") == self.sha256:
            return True
        if resume and not own.is_file():
            raise DeliberateError(
                f"resume=true: {self.path} "
                + ("does not exist" if stated is None else f"is of other settings: "
                   f"{differences(stated.get('settings'), self._settings)}")
            )  # fmt: skip
        if stated is not None:
            kept = self._aside(str(stated.get("sha256", "old")))
            os.replace(self.path, kept)
            self.notice = (
                f"an unfinished run of other settings "
                f"({differences(stated.get('settings'), self._settings)}) is kept as {kept}"
            )
        if not own.is_file():
            return False
        os.replace(own, self.path)
        return True

    def _aside(self, sha256: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{sha256[:_SHORT]}{self.path.suffix}")

    def _read(self) -> int:
        """Takes up the kept lines; returns the length of the file up to the last whole one."""
        length = 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file):
                if not raw.endswith(b"\n"):
                    break
                try:
                    line = parse_json(raw.decode("utf-8"), str(self.path))
                except ValueError:  # DeliberateError is one
                    line = None
                if not isinstance(line, dict):
                    raise DeliberateError(
                        f"{self.path} line {number + 1} is damaged: resume=false starts anew"
                    )
                length += len(raw)
                if number:
                    self.lines.append(line)
        return length


def check_resume(resume: Any) -> bool | None:
    """The setting `resume`: True, False, or None for ``auto``.

    Raises:
        DeliberateError: another value.
    """
    if resume is True or resume is False:
        return bool(resume)
    if resume != AUTO:
        raise DeliberateError(f"resume={resume} is not one of auto, true, false")
    return None


def differences(before: Any, now: Mapping[str, Any]) -> str:
    """Which settings differ, in words."""
    if not isinstance(before, Mapping):
        return "unknown ones"
    old, new = _flat(before), _flat(now)
    named = [
        f"{key} {old.get(key)} instead of {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return "; ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _head(path: Path) -> dict[str, Any] | None:
    """The first line of a partial file; empty where it states nothing; None without a file."""
    try:
        with path.open("rb") as file:
            raw = file.readline()
    except OSError:
        return None
    found: Any = None
    with contextlib.suppress(ValueError):  # DeliberateError is one
        found = parse_json(raw.decode("utf-8"), str(path))
    if not isinstance(found, dict) or found.get("partial") != FORMAT_VERSION:
        return {}
    return found


class AnswerLog:
    """Answers of a run that decodes in batches, kept batch by batch.

    Args:
        partial: where they are kept.
        key: which answers: those at full depth, or under certain thresholds.
    """

    def __init__(self, partial: PartialFile, key: str) -> None:
        self._partial, self._key = partial, key
        self._kept: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for line in partial.lines:
            if line.get("answers") != key:
                continue
            try:
                rows = tuple(int(row) for row in line["rows"])
                ids = [tuple(int(token) for token in answer) for answer in line["ids"]]
            except (KeyError, TypeError, ValueError):
                raise DeliberateError(f"{partial.path} is damaged: resume=false") from None
            if len(rows) == len(ids):
                self._kept[rows] = ids

    def take(
        self, rows: Sequence[int], decode: Callable[[], list[tuple[int, ...]]]
    ) -> list[tuple[int, ...]]:
        """The answers of a batch of rows: kept ones, or decoded now and then kept."""
        wanted = tuple(rows)
        if wanted not in self._kept:
            self._kept[wanted] = decode()
            line = {"answers": self._key, "rows": list(wanted), "ids": self._kept[wanted]}
            self._partial.append(line)
        return self._kept[wanted]
