"""Answers in text: taking the final one out, and comparing two of them.

Conventions:

* numbers compare as exact fractions: 0.33 is not 1/3; 1,000 = 1000; $5.00 = 5; 2\\frac12 = 2.5;
* a unit is ignored, and a percent sign is one: 10\\% = 10 and is not 0.1 (the questions of MATH
  name the unit they want, and its references write it or not); `5 million` is multiplied out;
* words compare without case and never as products of letters;
* a base is part of a reference that writes it: 25_8 is neither 25 nor 25_7;
* a ratio or a time of day (`3:4`) compares as text;
* ``x = 5`` equals ``5``, but not ``y = 5``.

What a model wrote is read in time linear in its length. Neither torch nor transformers nor sympy
is imported here: grading workers import this module.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from deliberate.data.problem import last_boxed
from deliberate.eval.grading.exact_numbers import exact_number, says_more_than_a_number
from deliberate.eval.grading.latex_text import compact, tidy
from deliberate.utils.errors import DeliberateError

Style = Literal["gsm8k", "boxed", "auto"]
STYLES: tuple[Style, ...] = ("gsm8k", "boxed", "auto")

_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*+([^\n]*+)")
_ANSWER = re.compile(r"answer\W{0,4}?(?:is|:|=)\s*+:?+\s*+", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s")
_LAST_NUMBER = re.compile(r"(?:(?<![\w)\]}.])[-−])?+\$?+\d[\d,]*+(?:\.\d++)?+(?:/\d++)?+%?+")
_PROSE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}+")

_TEXT_COMMAND = re.compile(r"\\text\{([^{}]*+)\}")
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z '.-]*+")
_LONG_WORD = re.compile(r"[A-Za-z]{4}|^(?:yes|no|odd)$", re.IGNORECASE)
_CHOICE = re.compile(r"\(([a-z])\)")
_BASED = re.compile(r"([0-9A-Fa-f]++)_\{?+(\d++)\}?+")
_COLON = re.compile(r"\d++(?::\d++)++")
_ASSIGNED = re.compile(r"[A-Za-z]\s*+=\s*+")

LONGEST_ANSWER = 2000  # characters; the longest MATH reference has under 200


def extract_answer(text: str, style: Style) -> str | None:
    """The final answer in a generated text, or None.

    ``gsm8k``: what follows the *first* ``####``, to the end of its line. A model that goes on
    after it has begun another problem; its last ``####`` would answer that one. ``boxed``: the
    last complete ``\\boxed{}`` (earlier boxes are intermediate results). ``auto``: the first of
    ``####``, box, "answer is X" (the last one; the last number of X where X is a sentence) and
    the last number that gives anything.
    """
    if style not in STYLES:
        raise DeliberateError(f"unknown answer style {style!r}: one of {', '.join(STYLES)}")
    if style in ("gsm8k", "auto"):
        mark = _MARK.search(text)
        if mark or style == "gsm8k":
            return (mark.group(1).strip() or None) if mark else None
    if style == "boxed":
        return last_boxed(text) or None
    return stated_answer(text) or _last_number(text)


def stated_answer(text: str) -> str | None:
    """The answer that a text says is one, boxed or as "answer is X": the last; None for none."""
    return last_boxed(text) or _stated(text)


def _stated(text: str) -> str | None:
    """X of the last "answer is X" in a text, to the end of its sentence or line."""
    for match in reversed(list(_ANSWER.finditer(text))):
        line_end = text.find("\n", match.end())
        line = text[match.end() : line_end if line_end >= 0 else len(text)].lstrip("*_ ").rstrip()
        close = line.find("$", 1) if line.startswith("$") else -1
        if close > 1 and line[close + 1 :].strip("*.") == "":
            return line[1:close]
        end = _SENTENCE_END.search(line)
        stated = _trimmed(line[: end.start()] if end else line)
        if stated and len(_PROSE_WORD.findall(stated)) > 2 and "\\" not in stated:
            stated = _last_number(stated) or stated
        if stated:
            return stated
    return None


def _last_number(text: str) -> str | None:
    found = _LAST_NUMBER.findall(text)
    return _trimmed(found[-1]) or None if found else None


def _trimmed(text: str) -> str:
    return text.strip().strip("$*_").rstrip(".,").strip()


def _words(text: str) -> str | None:
    """A text that is words, lower-case and without marks; None for what may be mathematics."""
    text = tidy(text)
    # A run of one to three letters may be a product of variables.
    if not _TEXT_COMMAND.fullmatch(text) and not (
        _PLAIN_WORDS.fullmatch(text) and _LONG_WORD.search(text)
    ):
        return None
    return _bare_words(text)


def _bare_words(text: str) -> str:
    text = " ".join(_TEXT_COMMAND.sub(r" \1 ", tidy(text)).split()).casefold().rstrip(".")
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else ",".join(part.strip() for part in text.split(","))


def compare_exactly(predicted: str, reference: str, style: Style) -> tuple[bool, str] | None:
    """``(equal, what settled it)`` without algebra; None for what is left to math-verify."""
    if len(predicted) > LONGEST_ANSWER:
        return False, "too_long"
    ours, theirs = exact_number(predicted), exact_number(reference)
    if ours is None and theirs is not None:
        # "5m" is five metres where five is asked for; in a reference m may be a variable.
        ours = exact_number(predicted, letter_units=True) or _assigned_number(predicted)
    elif theirs is None and ours is not None:
        theirs = _assigned_number(reference)
    if ours is not None and theirs is not None:
        return ours == theirs, "number"
    if compact(predicted) == compact(reference):
        return True, "string"
    if theirs is not None and says_more_than_a_number(predicted):
        return False, "number"
    if theirs is not None and style == "gsm8k":
        return False, "not_a_number"
    words = _words(reference)
    if words is not None:
        return _bare_words(predicted) == words, "text"
    based = _BASED.fullmatch(compact(reference)), _BASED.fullmatch(compact(predicted))
    if based[0] is not None:
        same = based[1] is not None and [g.upper() for g in based[0].groups()] == [
            g.upper() for g in based[1].groups()
        ]
        return same, "string"
    if _COLON.fullmatch(compact(reference)):
        return False, "string"
    return None


def _assigned_number(text: str) -> Fraction | None:
    """5 of ``x = 5``; None for ``2x = 5``."""
    text = tidy(text)
    match = _ASSIGNED.match(text)
    return exact_number(text[match.end() :]) if match else None
