"""One problem with its reference answer, and the marks that data sets put around final answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deliberate.utils.errors import DeliberateError

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*+")
# An escaped brace (of a set such as \{1, 2\}) opens and closes nothing; a row break escapes none.
_BRACE_OR_BOX = re.compile(
    r"[{}]|\\(?:((?:boxed|fbox)(?![A-Za-z]))\s*+|\\(?!(?:boxed|fbox)(?![A-Za-z]))|[{}])"
)
_BARE = re.compile(r"[^\s$]++")


ANSWER_MARK = "answer_mark"
"""Key of a checkpoint's `config.json`: the style of the final answers that it was trained on."""


@dataclass(frozen=True)
class Problem:
    """A question, its final answer and, where there is one, a worked solution.

    Attributes:
        id: unique within its source.
        question: the text of the question.
        answer: the final answer only (``"42"``, ``"\\frac{1}{2}"``), without ``####`` or a box.
        solution: step-by-step text; ends with ``#### answer`` where the source has that form.
        source: ``gsm8k``, ``math``, ``math500``, ``mawps``, ``asdiv_a``, ``words`` or
            ``chains`` (the project's own grammars) or ``reasoning_gym/<name>``.
        difficulty: number of steps (own grammar, GSM8K, arithmetic sets) or level 1-5 (MATH).
        subject: the source's own category, if it has one.
        metadata: further columns of the source; must be JSON-representable for fingerprints.

    Raises:
        DeliberateError: the question or the answer is not a string or is blank.
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


def mark_of(sources: Iterable[str]) -> str | None:
    """The answer style that training on these sources teaches; None where they hold no answers."""
    names = {name.partition("/")[0] for name in sources}
    if names & {"words", "chains", "gsm8k", "mawps", "asdiv_a", "reasoning_gym"}:
        return "gsm8k"
    return "boxed" if "math" in names else None


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` or ``\\fbox{...}`` whose braces balance, else None.

    ``\\boxed 5`` (no braces, as in a few MATH solutions) gives ``5``. A box that was cut off
    before its closing brace does not count: an earlier complete one does. The text is read once,
    from left to right, with a stack of the braces that are open.
    """
    first = _BOX.search(text)
    if first is None:
        return None
    open_braces: list[int] = []  # where each begins
    boxes: set[int] = set()  # begins of those that belong to a box
    last, end = -1, -1  # begin of the content of the last box that counts; end -1: no braces
    for match in _BRACE_OR_BOX.finditer(text, first.start()):
        at, found = match.start(), match[0]
        if found == "{":
            open_braces.append(at)
        elif found == "}":
            if open_braces:
                begin = open_braces.pop()
                if begin in boxes and begin > last:
                    last, end = begin, at
        elif match[1] is not None:  # a box; an escaped character has no group
            begin = match.end()
            if text.startswith("{", begin):
                boxes.add(begin)
            elif begin < len(text) and text[begin] not in "$":
                last, end = begin, -1
    if last < 0:
        return None
    if end >= 0:
        return text[last + 1 : end].strip()
    bare = _BARE.match(text, last)
    return bare.group().rstrip(".,;") if bare else None
