"""Answers in text: taking the final one out, and comparing two of them.

Conventions:

* numbers compare as exact fractions: 0.33 is not 1/3; 1,000 = 1000; $5.00 = 5; 2\\frac12 = 2.5;
* a unit is ignored, and a percent sign is one: 10\\% = 10 and is not 0.1 (the questions of MATH
  name the unit they want, and its references write it or not); `5 million` is multiplied out;
* words compare without case and never as products of letters;
* a base is part of a reference that writes it: 25_8 is neither 25 nor 25_7;
* a ratio or a time of day (`3:4`) compares as text;
* ``x = 5`` equals ``5``, but not ``y = 5``.

Neither torch nor transformers nor (before it is needed) sympy is imported here: grading workers
import this module.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from deliberate.errors import DeliberateError
from deliberate.train.problem import last_boxed

Style = Literal["gsm8k", "boxed", "auto"]
STYLES: tuple[Style, ...] = ("gsm8k", "boxed", "auto")

_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(
    r"answer\s*(?:is|:|=)\s*:?\s*(\$[^$\n]+\$|[^\n]+?)(?=\.?\s*(?:\n|$)|\.\s)", re.IGNORECASE
)
_LAST_NUMBER = re.compile(r"[-−]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"{_INTEGER}(?:\.\d*)?|\.\d+")
_SLASH = re.compile(rf"(?:(\d+)\s+)?({_INTEGER})\s*/\s*({_INTEGER})")
_FRAC = re.compile(r"(\d+)?\s*\\frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_FORMS = "|".join(form.pattern for form in (_REPEATING, _FRAC, _SLASH, _DECIMAL))
_NUMBER_AND_UNIT = re.compile(
    rf"(?P<number>[-+]?\s*(?:{_FORMS}))"
    r"(?P<unit>(?:\s*\\text\{[^{}]*\}|\s+[A-Za-z]{2,}(?:[ /-]+[A-Za-z]{2,})*|\s*/\s*[A-Za-z]+)*"
    r"(?:\s*\^\{?[23]\}?)?)"
)
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Words after a number that are no unit: the answer says more than the number.
_NOT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "or and to more less least most not than if for mod pi sqrt sin cos tan log ln exp "
        "infinity times plus minus",
    )
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_BASED = re.compile(r"([0-9A-Fa-f]+)_\{?(\d+)\}?")
_COLON = re.compile(r"\d+(?::\d+)+")
_ASSIGNED = re.compile(r"[A-Za-z]\s*=\s*")
_LONGEST_NUMBER = 200  # characters; Python refuses to convert integers of over 4,300 digits

_LONGEST_ANSWER = 2000  # characters; the longest MATH reference has under 200


def extract_answer(text: str, style: Style) -> str | None:
    """The final answer in a generated text, or None.

    ``gsm8k``: what follows the *first* ``####``, to the end of its line. A model that goes on
    after it has begun another problem; its last ``####`` would answer that one. ``boxed``: the
    last complete ``\\boxed{}`` (earlier boxes are intermediate results). ``auto``: the first of
    ``####``, box, "answer is X" (the last one) and the last number that gives anything.
    """
    if style not in STYLES:
        raise DeliberateError(f"unknown answer style {style!r}: one of {', '.join(STYLES)}")
    if style in ("gsm8k", "auto"):
        mark = _MARK.search(text)
        if mark or style == "gsm8k":
            return (mark.group(1).strip() or None) if mark else None
    boxed = last_boxed(text)
    if boxed or style == "boxed":
        return boxed or None
    stated = _ANSWER_IS.findall(text) or _LAST_NUMBER.findall(text)
    return str(stated[-1]).strip().strip("$*").rstrip(".,") or None if stated else None


def exact_number(text: str) -> Fraction | None:
    """The value of a text that is one number, with or without unit, as an exact fraction.

    Integers, decimals, thousands commas, a/b, ``\\frac{a}{b}``, mixed numbers, repeating decimals
    (``0.\\overline{3}``), currency and percent signs, degrees. None for anything else.
    """
    if len(text) > _LONGEST_NUMBER:
        return None
    match = _NUMBER_AND_UNIT.fullmatch(_for_number(text))
    if match is None:
        return None
    factor = _unit_factor(match["unit"])
    value = _value(match["number"])
    return None if factor is None or value is None else value * factor


def _value(number: str) -> Fraction | None:
    sign = -1 if number.startswith("-") else 1
    number = number.lstrip("+-").strip()
    try:
        if match := _REPEATING.fullmatch(number):
            whole, fixed, period = match.groups()
            head = Fraction(f"{whole or 0}.{fixed or 0}")
            return sign * (head + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed)))
        if match := _FRAC.fullmatch(number):
            whole, top, bottom = match[1], match[2] or match[3], match[4] or match[5]
            part = Fraction(int(top), int(bottom))
        elif match := _SLASH.fullmatch(number):
            whole, part = match[1], Fraction(_plain(match[2])) / Fraction(_plain(match[3]))
        else:
            return sign * Fraction(_plain(number))
    except (ValueError, ZeroDivisionError):
        return None
    if whole is not None and not 0 < part < 1:
        return None  # 2\frac{3}{2} may be a product: not ours to settle
    return sign * (part + int(whole or 0))


def _plain(number: str) -> str:
    return number.replace(",", "")


def _unit_factor(unit: str) -> int | None:
    """1 for a unit or none, 10**6 for "million apples", None where the words change the value."""
    factor = 1
    for word in re.findall(r"[a-z]+", unit.replace("\\text", "").lower()):
        if word in _NOT_UNITS:
            return None
        factor *= _SCALES.get(word, 1)
    return None if re.search(r"\d", re.sub(r"\^\{?[23]\}?$", "", unit.strip())) else factor


def _tidy(text: str) -> str:
    """One spelling for marks that do not change the meaning of a LaTeX or plain answer."""
    text = text.strip().replace("−", "-").replace("\\$", "").replace("$", "")
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text).strip().strip("*")
    # A spacing command, but not the second half of a row break followed by a space.
    text = re.sub(r"(?<!\\)\\[!,;:> ]|~", " ", text.replace("\\!", "").replace("{,}", ","))
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|textit|textrm|mbox|mathrm)\s*\{", r"\\text{", text)
    return text.strip().removesuffix(".").strip()


def _for_number(text: str) -> str:
    text = re.sub(r"(?<=\d),\s*\\!\s*(?=\d{3})", ",", text)
    text = re.sub(r"\^\{?\s*\\circ\s*\}?|°|\\?%|[€£]|\\degree", "", _tidy(text))
    return re.sub(r"(?<=\d) (?=\d{3}(?:\D|$))", "", text).strip()


def _words(text: str) -> str | None:
    """A text that is words, lower-case and without marks; None for what may be mathematics."""
    text = _tidy(text)
    whole = _TEXT_COMMAND.fullmatch(text)
    plain = re.fullmatch(r"[A-Za-z][A-Za-z '.-]*", text)
    # A run of one to three letters may be a product of variables.
    if not whole and not (plain and re.search(r"[A-Za-z]{4}|^(?:yes|no|odd)$", text, re.I)):
        return None
    return _bare_words(text)


def _bare_words(text: str) -> str:
    text = " ".join(_TEXT_COMMAND.sub(r" \1 ", _tidy(text)).split()).casefold().rstrip(".")
    return re.sub(r"\s*,\s*", ",", re.sub(r"^\(([a-z])\)$", r"\1", text))


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", _tidy(text))


def compare_exactly(predicted: str, reference: str, style: Style) -> tuple[bool, str] | None:
    """``(equal, what settled it)`` without algebra; None for what is left to math-verify."""
    if len(predicted) > _LONGEST_ANSWER:
        return False, "too_long"
    ours, theirs = exact_number(predicted), exact_number(reference)
    if ours is None and theirs is not None:
        ours = exact_number(_ASSIGNED.sub("", _tidy(predicted), count=1))
    elif theirs is None and ours is not None:
        theirs = exact_number(_ASSIGNED.sub("", _tidy(reference), count=1))
    if ours is not None and theirs is not None:
        return ours == theirs, "number"
    if _compact(predicted) == _compact(reference):
        return True, "string"
    number = _NUMBER_AND_UNIT.fullmatch(_for_number(predicted))
    if theirs is not None and number is not None:
        return False, "number"  # "5 or more", "1/0": math-verify would read the number alone
    if theirs is not None and style == "gsm8k":
        return False, "not_a_number"
    words = _words(reference)
    if words is not None:
        return _bare_words(predicted) == words, "text"
    based = _BASED.fullmatch(_compact(reference)), _BASED.fullmatch(_compact(predicted))
    if based[0] is not None:
        same = based[1] is not None and [g.upper() for g in based[0].groups()] == [
            g.upper() for g in based[1].groups()
        ]
        return same, "string"
    if _COLON.fullmatch(_compact(reference)):
        return False, "string"
    return None


def equal_by_math_verify(predicted: str, reference: str) -> bool:
    """Symbolic equality. Main thread only: math-verify limits its time (5 s a step) by SIGALRM."""
    from math_verify import parse, verify

    gold, target = (parse(f"${_tidy(text)}$") for text in (reference, predicted))
    return bool(verify(gold, target, allow_set_relation_comp=True))
