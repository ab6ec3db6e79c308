"""Equality of two answers that are mathematics: math-verify, with its gaps closed.

math-verify parses (`latex2sympy2_extended`) and compares (`sympy`). Three of its habits make wrong
answers right, and are undone here:

* it cuts units and words off the end by a list that holds ``ab``, ``c`` and ``more``, and falls
  back to the first number of what it cannot parse (``4\\sqrt(2)`` as 4). Here the parser gets the
  whole answer, without units by our own rule, and an answer that does not parse is not equal;
* it compares with an absolute tolerance of 1e-15 (1/2^99 = 1/2^98). Here a verdict of "equal" has
  to hold with 50 digits relatively, and to 200 digits where the difference can be computed;
* an open interval of two numbers equals the set of them, and an interval against an inequality
  depends on which is the reference. Here inequalities become sets first.

Time and memory are the caller's to limit (`GraderPool` runs this in worker processes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from deliberate.eval.grading.exact_numbers import is_unit_text, is_unit_word
from deliberate.eval.grading.latex_text import tidy, without_signs

_DIGITS, _MOST_DIGITS = 50, 200
_TOLERANCE, _SMALL = 1e-40, 1e-50  # relative; absolute, below which values may be noise
# Values put in for variables: no answer has its zeros, poles or periods there.
_POINTS = ((17, 7), (29, 31), (101, 37), (13, 43), (59, 11), (71, 83), (3, 97))

_BRACELESS = re.compile(
    r"\\(frac|binom)(?:\s*+(\d|\\pi)|\{([^{}]*+)\})(?:\s*+(\d)(?!\d)|\{([^{}]*+)\})"
)
_GROUPED = re.compile(r"(?<=\d),\s*+\\!\s*+(?=\d{3})")  # marked, so that it is no list
_MIXED = re.compile(r"(?<![\d._^])(\d++) (\d++)\s*+/\s*+(\d++)")
_TWO_NUMBERS = re.compile(r"(?<![\d._])\d++(?:\.\d*+)?+\s++\d|\d\.\d++\.")
_OPENED = re.compile(r"(?:\\?sqrt|\^)\s?+\(")
_LAST_TEXT = re.compile(r"\s*\\text\{([^{}]*+)\}(?:\^\{?+[23]\}?+)?+$")
_LAST_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]++$")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}+")
_KNOWN_WORDS = re.compile(
    r"(?:a?r?c?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|infinity|frac|max|min|and|or)[a-z]?"
)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_COMPLEX = re.compile(r"\\mathbb\{C\}|\\i(?:math)?\b|(?<![A-Za-z\\])i(?![A-Za-z])")


def equal_by_math_verify(predicted: str, reference: str) -> bool:
    """Symbolic equality. Main thread only: math-verify limits its time (5 s a step) by SIGALRM."""
    from math_verify import verify

    imaginary = bool(_COMPLEX.search(predicted) or _COMPLEX.search(reference))
    gold, target = (parse_answer(text, imaginary=imaginary) for text in (reference, predicted))
    if gold is None or target is None:
        return False
    gold, target = _comparable(gold, target)
    verdict = _agree(gold, target)
    if verdict is False or (verdict and _is_inequality(gold) and _is_inequality(target)):
        return verdict  # math-verify does not know that 2x > 6 is x > 3
    return bool(verify(gold, target, allow_set_relation_comp=True))


def parse_answer(text: str, *, imaginary: bool = False) -> Any | None:
    """The sympy object that a whole answer stands for, decimals as fractions, or None.

    Args:
        text: LaTeX or plain.
        imaginary: ``i`` is the imaginary unit and variables are complex.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex

    # Degrees matter to a sine; elsewhere they are a unit.
    degrees = bool(_ANGLE.search(text)) and ("circ" in text or "°" in text)
    text = _GROUPED.sub("", text)
    text = tidy(text).replace("°", r"^\circ") if degrees else without_signs(text)
    text = _BRACELESS.sub(_with_braces, text)
    text = _without_unit(_MIXED.sub(r"\1\\frac{\2}{\3}", text))
    if _TWO_NUMBERS.search(text) or any(
        not _KNOWN_WORDS.fullmatch(word) for word in _WORD.findall(_without_texts(text))
    ):
        return None  # the parser would read "2 3" as 5 and words as products of letters
    how = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    try:
        parsed = latex2sympy(
            normalize_latex(_braced(text), config=how),
            is_real=not imaginary,
            convert_degrees=degrees,
            normalization_config=None,
        )
        return _exact(parsed, imaginary)
    except Exception:  # the parser raises bare exceptions; sympy some of its own
        return None


def _with_braces(match: re.Match[str]) -> str:
    top, bottom = match[2] or match[3], match[4] or match[5]
    return rf"\{match[1]}{{{top}}}{{{bottom}}}"


def _without_texts(text: str) -> str:
    return re.sub(r"\\(?:text|begin|end|operatorname|mathbb|mathcal)\{[^{}]*+\}", " ", text)


def _without_unit(text: str) -> str:
    """The answer without a unit at its end; as it was where nothing that can bear one is left."""
    cut = text
    while match := _LAST_TEXT.search(cut):
        if not is_unit_text(match[1]) or not cut[: match.start()].strip():
            break
        cut = cut[: match.start()].rstrip()
    left = cut
    while (match := _LAST_WORD.search(left)) and is_unit_word(match[0]):
        if _KNOWN_WORDS.fullmatch(match[0]):
            break
        left = left[: match.start()].rstrip()
    return left if left.endswith((*"0123456789})", r"\pi")) else cut


def _braced(text: str) -> str:
    """``\\sqrt(2)`` as ``\\sqrt{2}`` and ``x^(a+b)`` as ``x^{a+b}``, by matching parentheses."""
    out, at = [], 0
    while match := _OPENED.search(text, at):
        depth, end = 0, -1
        for position in range(match.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            if depth == 0:
                end = position
                break
        if end < 0:
            break
        inner = _braced(text[match.end() : end])
        head = r"\sqrt" if "sqrt" in match[0] else "^"
        out.append(f"{text[at : match.start()]}{head}{{{inner}}}")
        at = end + 1
    return "".join(out) + text[at:]


def _exact(value: Any, imaginary: bool) -> Any:
    """Decimals as the fractions that they write, ``i`` as the imaginary unit where it is one."""
    import sympy
    from latex2sympy2_extended.logic import And
    from latex2sympy2_extended.sets import FiniteSet

    def inner(item: Any) -> Any:
        return _exact(item, imaginary)

    if isinstance(value, And | FiniteSet):
        return type(value)(*map(inner, value._unsorted_args))
    if isinstance(value, sympy.core.relational.Relational):
        return value.func(inner(value.lhs), inner(value.rhs), evaluate=False)
    if isinstance(value, sympy.Tuple):
        return sympy.Tuple(*map(inner, value))
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(inner)
    if not isinstance(value, sympy.Basic):
        return value
    table: dict[Any, Any] = {f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float)}
    if imaginary:
        table |= {s: sympy.I for s in value.atoms(sympy.Symbol) if s.name == "i"}
    return value.xreplace(table) if table else value


def _comparable(gold: Any, target: Any) -> tuple[Any, Any]:
    """An inequality against a set becomes a set, whichever of the two it is."""
    import sympy

    pair = [_membership(gold), _membership(target)]
    for mine, other in ((0, 1), (1, 0)):
        if isinstance(pair[other], sympy.Set) and _is_inequality(pair[mine]):
            as_set = _solutions(pair[mine])
            pair[mine] = pair[mine] if as_set is None else as_set
    return pair[0], pair[1]


def _membership(value: Any) -> Any:
    """The set of ``x \\in (0, 1)``, which the parser reads as an equation."""
    import sympy

    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol and isinstance(value.rhs, sympy.Set):
        return value.rhs
    return value


def _is_inequality(value: Any) -> bool:
    import sympy

    parts = _parts(value)
    return bool(parts) and all(
        isinstance(p, sympy.core.relational.Relational) and not isinstance(p, sympy.Eq)
        for p in parts
    )


def _parts(value: Any) -> Sequence[Any]:
    from latex2sympy2_extended.logic import And

    return value._unsorted_args if isinstance(value, And) else (value,)


def _solutions(relation: Any) -> Any | None:
    """The real solutions of inequalities in one variable, or None."""
    import sympy

    parts = [_with_symbols(part) for part in _parts(relation)]
    if len(set().union(*(part.free_symbols for part in parts))) != 1:
        return None
    try:
        return sympy.Intersection(*(part.as_set() for part in parts))
    except Exception:
        return None


def _with_symbols(part: Any) -> Any:
    """The relation with a symbol for each unknown function, such as f(x) in 0 < f(x) < 1."""
    import sympy
    from sympy.core.function import AppliedUndef

    unknown = {f: sympy.Symbol(str(f), real=True) for f in part.atoms(AppliedUndef)}
    return part.func(*(side.xreplace(unknown) for side in part.args), evaluate=False)


def _agree(gold: Any, target: Any) -> bool | None:
    """Whether two parsed answers have the same values; None where values do not tell."""
    import sympy

    gold, target = _assigned(gold, target)
    relation = sympy.core.relational.Relational
    if isinstance(gold, relation) and isinstance(target, relation):
        return _same_relation(gold, target)
    if isinstance(gold, sympy.MatrixBase) and isinstance(target, sympy.MatrixBase):
        return gold.shape == target.shape and _all_agree(gold.flat(), target.flat())
    if isinstance(gold, sympy.Tuple) and isinstance(target, sympy.Tuple):
        return len(gold) == len(target) and _all_agree(gold, target)
    if isinstance(gold, sympy.Set | sympy.Tuple) or isinstance(target, sympy.Set | sympy.Tuple):
        return _same_set(gold, target)
    if isinstance(gold, sympy.Expr) and isinstance(target, sympy.Expr):
        return _same_value(gold, target)
    return None


def _all_agree(gold: Sequence[Any], target: Sequence[Any]) -> bool | None:
    verdicts = [_agree(a, b) for a, b in zip(gold, target, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _assigned(gold: Any, target: Any) -> tuple[Any, Any]:
    """``x = 5`` against ``5``: the right side, as math-verify reads it."""
    import sympy

    pair = [gold, target]
    for mine, other in ((0, 1), (1, 0)):
        last = _parts(pair[mine])[-1]
        if isinstance(last, sympy.Eq) and not any(
            isinstance(p, sympy.core.relational.Relational) for p in _parts(pair[other])
        ):
            pair[mine] = last.rhs
    return pair[0], pair[1]


def _same_relation(gold: Any, target: Any) -> bool | None:
    """Equations and inequalities: one side minus the other, up to a constant factor."""
    import sympy

    a, b = gold.lhs - gold.rhs, target.lhs - target.rhs
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    if gold.rel_op == turned.get(target.rel_op):
        b = -b
    elif gold.rel_op != target.rel_op:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols or not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return None
    ratios = [sympy.N((a / b).subs(_points(symbols, shift)), _DIGITS) for shift in range(3)]
    known = all(isinstance(r, sympy.Number) and r.is_finite and r != 0 for r in ratios)
    if known and all(abs(r / ratios[0] - 1) < _TOLERANCE for r in ratios):
        return bool(ratios[0] > 0) or isinstance(gold, sympy.Eq | sympy.Ne)
    if not isinstance(gold, sympy.Eq):
        solved = _solutions(gold), _solutions(target)
        return None if None in solved else bool(solved[0] == solved[1])
    try:
        left, right = (sympy.solve(r, symbols[0], dict=False) for r in (gold, target))
    except Exception:
        return None
    return len(left) == len(right) and _matched(left, right)


def _points(symbols: Sequence[Any], shift: int) -> dict[Any, Any]:
    """Fixed fractions for the variables, others for every shift."""
    import sympy

    return {
        symbol: sympy.Rational(*_POINTS[(place + shift) % len(_POINTS)]) + place // len(_POINTS)
        for place, symbol in enumerate(symbols)
    }


def _same_set(gold: Any, target: Any) -> bool | None:
    import sympy

    if isinstance(gold, sympy.Interval) and isinstance(target, sympy.Interval):
        return (
            gold.left_open == target.left_open
            and gold.right_open == target.right_open
            and _all_agree((gold.start, gold.end), (target.start, target.end))
        )
    if isinstance(gold, sympy.FiniteSet) and isinstance(target, sympy.FiniteSet):
        return _matched(gold.args, target.args) if len(gold) == len(target) else None
    if isinstance(gold, sympy.Union) and isinstance(target, sympy.Union):
        return _matched(gold.args, target.args) if len(gold.args) == len(target.args) else None
    for one, other in ((gold, target), (target, gold)):
        if isinstance(one, sympy.Interval | sympy.Tuple) and isinstance(other, sympy.FiniteSet):
            # A point or an open interval is no list of numbers, unless that names coordinates.
            named = list(getattr(other, "_unsorted_args", other.args))
            if not all(isinstance(v, sympy.Eq) for v in named):
                return False
            places = (one.start, one.end) if isinstance(one, sympy.Interval) else tuple(one)
            values = [v.rhs for v in named]
            return len(places) == len(values) and _all_agree(places, values)
        if isinstance(one, sympy.Interval) and isinstance(other, sympy.Tuple):
            return len(other) == 2 and _all_agree((one.start, one.end), tuple(other))
    return None


def _matched(gold: Sequence[Any], target: Sequence[Any]) -> bool | None:
    """Whether every element has a partner; None where that is not sure."""
    left, sure = list(target), True
    for item in gold:
        verdicts = [_agree(item, other) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            sure = False
            left.pop(verdicts.index(None))
        else:
            return False
    return True if sure else None


def _same_value(gold: Any, target: Any) -> bool | None:
    import sympy

    if gold == target:
        return True
    if any(item.is_Symbol and len(item.name) > 1 for item in (gold, target)):
        return None  # math-verify reads the word abc and the product of a, b, c alike
    if gold.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) or target.has(
        sympy.oo, -sympy.oo, sympy.zoo, sympy.nan
    ):
        return None
    symbols = sorted(gold.free_symbols | target.free_symbols, key=str)
    known: bool | None = None
    for shift in range(3 if symbols else 1):
        verdict = _same_number(gold, target, symbols, shift)
        if verdict is False:
            return False
        known = verdict if verdict is None or shift == 0 else known
    return known


def _same_number(gold: Any, target: Any, symbols: Sequence[Any], shift: int) -> bool | None:
    import sympy
    from sympy.core.evalf import PrecisionExhausted

    if gold.is_Rational and target.is_Rational:
        return bool(gold == target)
    points = _points(symbols, shift)
    gold, target = gold.subs(points), target.subs(points)
    a, b = sympy.N(gold, _DIGITS), sympy.N(target, _DIGITS)
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return None
    size = max(abs(a), abs(b))
    # Of two values that cancel to zero only noise is left: their difference decides.
    if size > _SMALL and abs(a - b) > size * _TOLERANCE:
        return False
    try:
        difference = (gold - target).evalf(15, maxn=_MOST_DIGITS, strict=True)
    except PrecisionExhausted:
        return True
    return bool(difference == 0) if difference.is_number else None
