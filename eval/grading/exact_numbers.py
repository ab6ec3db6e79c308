"""Answers that are one number, with or without unit, as exact fractions.

The text is read once from left to right (possessive quantifiers, no nested repetition): the time
is linear in its length, whatever a model wrote.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from deliberate.eval.grading.latex_text import without_signs

_INTEGER = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*+)?+|\.\d++)"
_EXPONENT = r"\^\s*+(?:\{\s*+([-+]?\d++)\s*+\}|(-?\d++))"
_SIGN = re.compile(r"([-+]?+)\s*+")
_REPEATING = re.compile(r"(\d*+)\.(\d*+)\\overline\s*+\{(\d++)\}")
_FRAC = re.compile(
    r"(\d++)?+\s*+\\frac\s*+(?:\{\s*+(-?\d++)\s*+\}|(\d))\s*+(?:\{\s*+(\d++)\s*+\}|(\d))"
)
_SLASH = re.compile(rf"(?:(\d++)\s++)?({_INTEGER})\s*+/\s*+({_INTEGER})")
_SCIENTIFIC = re.compile(rf"({_DECIMAL})\s*+(?:\\times|\\cdot|[x*])\s*+10\s*+{_EXPONENT}")
_POWER = re.compile(rf"({_INTEGER})\s*+{_EXPONENT}")
_PLAIN = re.compile(_DECIMAL)

_UNIT_ITEM = re.compile(r"(\s*+[/-]\s*+|\s*+)(?:\\text\{([^{}]*+)\}|([A-Za-z]++))")
_UNIT_END = re.compile(r"\s*+(\^\{?+[23]\}?+)?+\s*+")
_LETTERS = re.compile(r"[a-z]++")


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Words after a number that are no unit: the answer says more than the number.
_PROSE = _set_of("or and to more less least most not than if for mod times plus minus")
_FUNCTIONS = _set_of("pi sqrt sin cos tan cot sec csc log ln exp infinity")
_AFTER_FUNCTION = re.compile(r"(?:arc)?+(?:sin|cos|tan|cot|csc|log|exp|sqrt)[a-z]?")
# Two and three letters may be a product of variables, unless they are one of these.
_SHORT_UNITS = _set_of(
    "mm cm dm km in ft yd mi kg mg lb lbs oz ml dl cl gal qt pt hr hrs min mins sec secs ms mph "
    "kph cc gb mb kb tb am pm sq cu deg rad mol yr yrs usd eur mpg rpm psi wpm pct"
)
_SHORT_NOUNS = _set_of(
    "men day cup egg hat pen car dog cat cow pig hen box bag toy pie ton can jar job kid lap bus "
    "row ant bee fox nut pea rat bat pot pan bed bun fan gem key log map mug net pin rod tie tin "
    "tip top van win way age boy son bar bit ads ice oil gum ham jug mat set cub cap bow act art"
)
_CONNECTORS = _set_of("of the a an in on at per by each with")
_AFTER_SLASH = _set_of("h s m l g d")
_ATTACHED_LETTERS = _set_of("m g s l")

_LONGEST_NUMBER = 200  # characters; Python refuses to convert integers of over 4,300 digits
_LARGEST_POWER = 4096  # bits of a value that is written as a power


def exact_number(text: str, *, letter_units: bool = False) -> Fraction | None:
    """The value of a text that is one number, with or without unit, as an exact fraction.

    Integers, decimals, thousands commas, a/b, ``\\frac{a}{b}``, mixed numbers, repeating decimals
    (``0.\\overline{3}``), powers of an integer (``10^{3}``), ``2.5 \\times 10^{4}``, currency and
    percent signs, degrees. None for anything else, among it powers of over 4,096 bits.

    Args:
        letter_units: one letter may be a unit (``5m``), and not only a variable.
    """
    read = _read(text)
    if read is None:
        return None
    value, rest = read
    factor = _unit_factor(rest, letter_units)
    return None if factor is None else value * factor


def says_more_than_a_number(text: str) -> bool:
    """Whether the text is a number followed by words that change it ("5 or more", "1/0")."""
    read = _read(text)
    if read is None:
        return bool(len(text) <= _LONGEST_NUMBER and _SLASH.fullmatch(without_signs(text)))
    return any(word in _PROSE for word in _LETTERS.findall(read[1].lower()))


def is_unit_word(word: str) -> bool:
    """Whether a word after an expression can only be a unit and not a product of variables."""
    word = word.lower()
    if word in _SHORT_UNITS or word in _SHORT_NOUNS or word in _SCALES:
        return True
    if len(word) < 4 or word in _PROSE or word in _FUNCTIONS or _AFTER_FUNCTION.fullmatch(word):
        return False
    return any(ord(b) - ord(a) != 1 for a, b in pairwise(word))  # abcd is none


def is_unit_text(text: str) -> bool:
    """Whether the content of ``\\text{}`` after an expression may be dropped as a unit."""
    words = _LETTERS.findall(text.lower())
    return not any(character.isdigit() for character in text) and not (
        set(words) & (_PROSE | _FUNCTIONS | set(_SCALES))
    )


def _read(text: str) -> tuple[Fraction, str] | None:
    """The number that a text begins with, and the rest."""
    if len(text) > _LONGEST_NUMBER:
        return None
    text = without_signs(text)
    sign = _SIGN.match(text)
    assert sign is not None  # it matches nothing, too
    try:
        read = _value(text, sign.end())
    except (ValueError, ZeroDivisionError):
        return None
    if read is None:
        return None
    value, end = read
    return (-value if sign[1] == "-" else value), text[end:]


def _value(text: str, at: int) -> tuple[Fraction, int] | None:
    if match := _REPEATING.match(text, at):
        whole, fixed, period = match.groups()
        head = Fraction(f"{whole or 0}.{fixed or 0}")
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
        return head + tail, match.end()
    if match := _FRAC.match(text, at):
        part = Fraction(int(match[2] or match[3]), int(match[4] or match[5]))
        return _mixed(match[1], part, match.end())
    if match := _SLASH.match(text, at):
        return _mixed(match[1], _plain(match[2]) / _plain(match[3]), match.end())
    if match := _SCIENTIFIC.match(text, at):
        power = _power(Fraction(10), int(match[2] or match[3]))
        return None if power is None else (_plain(match[1]) * power, match.end())
    if match := _POWER.match(text, at):
        power = _power(_plain(match[1]), int(match[2] or match[3]))
        return None if power is None else (power, match.end())
    if match := _PLAIN.match(text, at):
        return _plain(match[0]), match.end()
    return None


def _mixed(whole: str | None, part: Fraction, end: int) -> tuple[Fraction, int] | None:
    if whole is not None and not 0 < part < 1:
        return None  # 2\frac{3}{2} may be a product: not ours to settle
    return part + int(whole or 0), end


def _power(base: Fraction, exponent: int) -> Fraction | None:
    if abs(exponent) * max(base.numerator.bit_length(), 1) > _LARGEST_POWER:
        return None
    return base**exponent


def _plain(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _unit_factor(rest: str, letter_units: bool) -> int | None:
    """1 for a unit or none, 10**6 for "million apples", None where the words change the value."""
    factor, units, at = 1, 0, 0
    while match := _UNIT_ITEM.match(rest, at):
        glue, braced, word = match.groups()
        if braced is not None:
            braced = re.sub(r"\^[23]", "", braced.lower())
            if any(character.isdigit() for character in braced):
                return None
            words = _LETTERS.findall(braced)
        else:
            words = [word.lower()]
            if not _bare_unit(words[0], glue, units, letter_units):
                return None
        for item in words:
            if item in _PROSE or item in _FUNCTIONS:
                return None
            factor *= _SCALES.get(item, 1)
        units, at = units + 1, match.end()
    end = _UNIT_END.fullmatch(rest, at)
    # A power belongs to a unit: 3^2 is nine, 3 cm^2 is three.
    return factor if end and (units or not end[1]) else None


def _bare_unit(word: str, glue: str, units: int, letter_units: bool) -> bool:
    if units and (word in _CONNECTORS or ("/" in glue and word in _AFTER_SLASH)):
        return True
    if not glue and not units:
        return word in _SHORT_UNITS or (letter_units and word in _ATTACHED_LETTERS)
    if len(word) == 1:
        return letter_units and not units and word in _ATTACHED_LETTERS and not glue.strip()
    return is_unit_word(word)
