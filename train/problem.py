"""One problem with its reference answer: the record that data sources make and tasks consume.

The marks that data sets put around a final answer are read here too, since sources and graders
both need them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deliberate.errors import DeliberateError

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^\s$]+")


@dataclass(frozen=True)
class Problem:
    """A question, its final answer and, where there is one, the way to it.

    Attributes:
        id: unique within its source.
        question: the text put to the model.
        answer: the final answer only (``"42"``, ``"\\frac{1}{2}"``), without ``####`` or a box.
        solution: step-by-step text; ends with ``#### answer`` where the source has that form.
        source: ``gsm8k``, ``math``, ``math500``, ``mawps``, ``asdiv_a``, ``words`` (the project's
            own grammar) or ``reasoning_gym/<name>``.
        difficulty: number of steps (own grammar, GSM8K, arithmetic sets) or level 1-5 (MATH).
        subject: the source's own category, if it has one.
        metadata: whatever else the source says about the problem; must be JSON-representable
            for fingerprints.

    Raises:
        DeliberateError: the question or the answer is not a text or is blank.
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    source: str = ""
    difficulty: int | None = None
    subject: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise DeliberateError(
                    f"problem {self.id!r} has {name}={value!r}: a non-empty text is needed"
                )


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` or ``\\fbox{...}`` whose braces balance, else None.

    ``\\boxed 5`` (no braces, as in a few MATH solutions) gives ``5``. A box that was cut off
    before its closing brace does not count: an earlier complete one does.
    """
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        if text[start : start + 1] != "{":
            bare = _BARE.match(text, start)
            if bare:
                return bare.group().rstrip(".,;")
            continue
        depth = 0
        for position in range(start, len(text)):
            # An escaped brace (a set such as \{1, 2\}) opens and closes in pairs of its own.
            if text[position] in "{}" and text[position - 1] != "\\":
                depth += 1 if text[position] == "{" else -1
                if depth == 0:
                    return text[start + 1 : position].strip()
    return None
