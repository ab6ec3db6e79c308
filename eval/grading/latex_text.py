"""One spelling for what does not change the meaning of a LaTeX or plain answer.

Every function reads its text once from left to right: the quantifiers are possessive or bounded,
so no text a model may write makes them slow.
"""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "√": r"\sqrt ",
        "²": "^2",
        "³": "^3",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_DELIMITER = re.compile(r"^\\[(\[]|\\[)\]]$")
# A spacing command, but not the second half of a row break followed by a space.
_SPACING = re.compile(r"(?<!\\)\\[!,;:> ]|~")
_SIZING = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])")
_FRACTION = re.compile(r"\\[dtc]frac")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf)\s*+\{")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),\s*+\\!\s*+(?=\d{3})")
_SIGNS = re.compile(r"\^\{?+\s*+\\circ\s*+\}?+|°|\\?+%|[€£]|\\degree")
_THOUSANDS_SPACE = re.compile(r"(?<=\d) (?=\d{3}(?:\D|$))")


def tidy(text: str) -> str:
    """The answer without spacing and sizing commands, dollar signs and outer marks."""
    text = text.strip().translate(_CHARACTERS).replace("\\$", "").replace("$", "")
    text = _DELIMITER.sub("", text.strip()).strip().strip("*")
    text = _SPACING.sub(" ", text.replace("\\!", "").replace("{,}", ","))
    text = _FRACTION.sub(r"\\frac", _SIZING.sub("", text))
    return _TEXT.sub(r"\\text{", text).strip().removesuffix(".").strip()


def without_signs(text: str) -> str:
    """The tidied answer also without percent, currency and degree signs and thousands spaces."""
    text = _SIGNS.sub("", tidy(_THOUSANDS_COMMA.sub(",", text)))
    return _THOUSANDS_SPACE.sub("", text).strip()


def compact(text: str) -> str:
    """The tidied answer without white space: equal ones are the same expression."""
    return "".join(tidy(text).split())
