"""Plain text and user files as training data: JSON lines with named columns.

The `text` source is every ``<data_dir>/text/*.jsonl`` with a column ``text``; ``text/NAME`` one of
these files. A tenth of the documents, chosen by a hash of their text, is kept out of training so
that a figure can be taken on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from deliberate.data.problem import Problem
from deliberate.data.sources import data_root, file_rows, hub_rows
from deliberate.utils.errors import DeliberateError

TEXT = "text"
HELD_OUT = 10
"""One document in so many is in the test split."""

FILE_SETTINGS = ("path", "hub", "text", "tokens", "prompt", "question", "answer", "solution")


@dataclass(frozen=True)
class Document:
    """A text without question and answer; `tokens` where its exact ids are known.

    Attributes:
        prompt: number of prompt tokens at the start of `tokens`; the rest is the answer, with the
            end token where the answer is complete.
    """

    text: str
    tokens: tuple[int, ...] | None = None
    prompt: int = 0


def is_text(name: str) -> bool:
    """Whether the source of this name in ``data.weights`` is plain text."""
    return name == TEXT or name.startswith(f"{TEXT}/")


def text_split(text: str) -> str:
    """``test`` for one text in ten, by a hash; ``train`` for the others."""
    digest = hashlib.sha256(text.strip().encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % HELD_OUT == 0 else "train"


def load_texts(
    name: str = TEXT,
    split: str = "train",
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
) -> list[Document]:
    """Documents of one split, in the order of file names and lines.

    Args:
        name: ``text`` (all files) or ``text/NAME`` (``text/NAME.jsonl``).
        split: ``train`` or ``test``.
        data_dir: the folder; without it the environment variable ``DELIBERATE_DATA``.
        limit: stop after so many.

    Raises:
        DeliberateError: no folder, no such file, a broken line, a row without ``text``.
    """
    if split not in ("train", "test"):
        raise DeliberateError(f"split {split!r} of plain text is unknown; it is train or test")
    folder = data_root(name, f"{TEXT}/NAME.jsonl", data_dir) / TEXT
    there = sorted(folder.glob("*.jsonl"))
    wanted = [p for p in there if name == TEXT or p.stem == name.partition("/")[2]]
    if not wanted:
        found = ", ".join(p.stem for p in there) or "no *.jsonl"
        raise DeliberateError(f"no text for source {name!r} in {str(folder)!r}: there is {found}")
    documents: list[Document] = []
    for path in wanted:
        for where, row in file_rows(path):
            text = _column(row, TEXT, where)
            if text_split(text) == split:
                documents.append(Document(text))
                if len(documents) == limit:
                    return documents
    if not documents:
        raise DeliberateError(f"source {name!r} has no document in its {split} split")
    return documents


def load_file(
    name: str, settings: Mapping[str, Any], *, limit: int | None = None
) -> list[Problem | Document]:
    """Rows of a user's own data as problems or documents.

    Args:
        name: of the source, for messages.
        settings: ``path`` (JSON lines) or ``hub`` (``owner/name[:config]``), and the names of the
            columns: ``text``; ``tokens`` (lists of token ids) and optionally ``prompt`` (how many
            of them are the prompt); or ``question``, ``answer`` and optionally ``solution``.
        limit: only the first so many rows.

    Raises:
        DeliberateError: incomplete settings, or rows without the named columns.
    """
    key = f"data.files.{name}"
    unknown = sorted(set(settings) - set(FILE_SETTINGS))
    if unknown:
        raise DeliberateError(
            f"unknown setting {key}.{unknown[0]}; known: {', '.join(FILE_SETTINGS)}"
        )
    given = {k: v for k, v in settings.items() if v is not None}
    if ("path" in given) == ("hub" in given):
        raise DeliberateError(f"{key} needs either path (a file of JSON lines) or hub (owner/name)")
    if TEXT in given and "tokens" in given:
        raise DeliberateError(f"{key} has columns of text and of tokens: name one of them")
    if "prompt" in given and "tokens" not in given:
        raise DeliberateError(f"{key}.prompt counts tokens: name the column of tokens too")
    plain = TEXT in given or "tokens" in given
    if not plain and not {"question", "answer"} <= set(given):
        raise DeliberateError(
            f"{key} needs the column of text or of tokens, or those of question and answer"
        )
    items: list[Problem | Document] = []
    for number, (where, row) in enumerate(_rows(name, given, key)):
        items.append(
            _document(given, row, where) if plain else _problem(name, number, given, row, where)
        )
        if len(items) == limit:
            break
    if not items:
        raise DeliberateError(f"{key}: {given.get('path') or given['hub']} has no rows")
    return items


def _rows(name: str, given: Mapping[str, Any], key: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if "hub" in given:
        return hub_rows(name, "train", str(given["hub"]))
    path = Path(str(given["path"])).expanduser()
    if not path.is_file():
        raise DeliberateError(f"{key}.path={path} does not exist: give a file of JSON lines")
    return file_rows(path)


def _document(given: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Document:
    """A row of text, or of token ids and the length of their prompt."""
    if TEXT in given:
        return Document(_column(row, given[TEXT], where))
    ids = row.get(given["tokens"])
    if not _whole(ids) or not ids:
        filled = ", ".join(sorted(row)) or "none"
        raise DeliberateError(
            f"{where} has no list of token ids in {given['tokens']!r}: it has {filled}"
        )
    lengths = [row.get(given["prompt"]) if "prompt" in given else 0]
    if not _whole(lengths) or lengths[0] >= len(ids):
        raise DeliberateError(
            f"{where}: {given['prompt']}={lengths[0]!r} must be how many of its {len(ids)} tokens "
            "are the prompt"
        )
    return Document("", tuple(ids), lengths[0])


def _whole(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values
    )


def _problem(
    name: str, number: int, given: Mapping[str, Any], row: Mapping[str, Any], where: str
) -> Problem:
    solution = given.get("solution")
    return Problem(
        id=f"{name}/{number}",
        question=_column(row, given["question"], where),
        answer=_column(row, given["answer"], where),
        # Without a worked solution the answer itself is the completion.
        solution=_column(row, solution or given["answer"], where),
        source=name,
    )


def _column(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None or not str(value).strip():
        filled: Sequence[str] = sorted(k for k, v in row.items() if v not in (None, ""))
        raise DeliberateError(
            f"{where} has no column {column!r}: it has {', '.join(filled) or 'none'}"
        )
    return str(value)
