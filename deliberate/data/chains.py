"""A seeded grammar of chains of reasoning that go on after the answer is known.

A chain solves a problem of `word_problems` between think tags, checks the answer several times and
states it after the closing tag. Some chains are doubtful: their last step is wrong at first (a
borrow or a carry is forgotten) and a later check corrects it, so that stopping before the check
gives a wrong answer. `AnswerPoint` states where the answer of a chain is determined.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deliberate.data.problem import Problem
from deliberate.data.word_problems import MAX_STEPS, MIN_STEPS, distinct_problems, word_problem
from deliberate.utils.errors import DeliberateError

CHAINS = "chains"
"""The source's name in mixtures and tasks."""
OPEN_TAG, CLOSE_TAG = "<think>", "</think>"

_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}
_SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
_ORDINALS = ("First", "Second", "Third", "Fourth")
_SWITCHES = (
    "Wait, let me check that.",
    "Hmm, let me verify this.",
    "But let me make sure.",
    "Let me check again.",
    "Alternatively, I can look at it another way.",
)
# Probability that the last step is wrong at first, where it borrows and where it carries.
_BORROW_SLIP, _CARRY_SLIP = 0.7, 0.2
# Probability that the first check repeats the mistake, where the second number is from 20 on.
_UNNOTICED, _UNNOTICED_SMALL = 0.85, 0.15
# Share of the chains that end without a check, and of those with one check less than usual.
_UNCHECKED, _ONE_LESS = 0.08, 0.15
# Probability of a doubt that changes nothing, after a product or quotient and after other steps.
_DOUBT_PRODUCT, _DOUBT = 0.6, 0.1


@dataclass(frozen=True)
class AnswerPoint:
    """Where a chain's answer is determined.

    Attributes:
        determined_at: characters of `Problem.solution` up to the end of the number that first
            states the final answer, with no other answer stated after it.
        doubtful: another answer was stated before it.
        checks: checks in the chain.
    """

    determined_at: int
    doubtful: bool
    checks: int

    @classmethod
    def of(cls, problem: Problem) -> AnswerPoint:
        """The point of a problem of `chain_problem`.

        Raises:
            DeliberateError: the problem is from another source.
        """
        if problem.source != CHAINS:
            raise DeliberateError(
                f"problem {problem.id!r} is from {problem.source!r}: only {CHAINS!r} states where "
                "an answer is determined"
            )
        return cls(**problem.metadata)

    def token(self, offsets: Sequence[tuple[int, int]]) -> int:
        """Tokens of the solution until the answer is determined.

        Args:
            offsets: (start, end) in characters of each token of the solution, as the tokenizer
                returns them with ``return_offsets_mapping=True``.
        """
        return next(n for n, (_, end) in enumerate(offsets, 1) if end >= self.determined_at)


@dataclass(frozen=True)
class _Equation:
    left: int
    sign: str
    right: int
    value: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.value}"

    def backwards(self) -> str:
        return f"{self.value} {_INVERSE[self.sign]} {self.right} = {self.left}"

    def spoken(self) -> str:
        return f"{self.left} {_SPOKEN[self.sign]} {self.right} is {self.value}"

    def slipped(self, rng: random.Random) -> _Equation | None:
        """The equation with a forgotten borrow or carry, drawn where there is one."""
        units, tens = self.left % 10, self.right % 10
        if self.sign == "-" and units < tens and rng.random() < _BORROW_SLIP:
            return _Equation(self.left, "-", self.right, self.value + 10)
        if self.sign == "+" and units + tens >= 10 and rng.random() < _CARRY_SLIP:
            return _Equation(self.left, "+", self.right, self.value - 10)
        return None


class _Writer:
    """The lines of a chain, and where its stated answer last changed."""

    def __init__(self) -> None:
        self.text = f"{OPEN_TAG}\n"
        self.stated: int | None = None
        self.determined_at = 0
        self.changes = 0

    def line(self, text: str, answer: int | None = None) -> None:
        """Adds a line; `answer` is the answer that it states, at its last occurrence."""
        if answer is not None and answer != self.stated:
            self.changes += self.stated is not None
            self.stated = answer
            place = text.rindex(str(answer)) + len(str(answer))
            self.determined_at = len(self.text) + place
        self.text += f"{text}\n"


def _check(number: int, equations: Sequence[_Equation]) -> str:
    """Check `number` (from 0): forwards, backwards, in words, forwards."""
    name = f"{_ORDINALS[number]} check"
    if number == 1:
        return f"{name}, backwards: {', '.join(e.backwards() for e in reversed(equations))}."
    if number == 2:
        return f"{name}, in words: {', '.join(e.spoken() for e in equations)}."
    return f"{name}: {', '.join(map(str, equations))}."


def _checks(rng: random.Random, steps: int) -> int:
    """How many checks a chain of `steps` steps has."""
    drawn = rng.random()
    if drawn < _UNCHECKED:
        return 0
    usual = 4 if steps <= 3 else 3
    return usual - (drawn < _UNCHECKED + _ONE_LESS)


def _doubt(rng: random.Random, last: _Equation) -> str:
    wrong = max(1, last.value + rng.choice((-10, -2, -1, 1, 2, 10)))
    return f"Hmm, could it be {wrong}? No, {last}."


def write_chain(rng: random.Random, solution: str) -> tuple[str, AnswerPoint]:
    """A chain over a solution of the word-problem grammar, and its answer point.

    Args:
        solution: lines with one equation each, the last ``#### answer``.
    """
    *lines, final = solution.split("\n")
    equations = [
        _Equation(int(m[1]), m[2], int(m[3]), int(m[4]))
        for m in (_EQUATION.search(line) for line in lines)
        if m is not None
    ]
    last = equations[-1]
    count = _checks(rng, len(lines))
    wrong = last.slipped(rng) if count else None
    shown = last if wrong is None else wrong
    writer = _Writer()
    for line in lines[:-1]:
        writer.line(line)
    writer.line(lines[-1].replace(str(last), str(shown)), shown.value)
    writer.line(f"So it is {shown.value}.", shown.value)
    noticed = 0
    if wrong is not None:
        share = _UNNOTICED if last.right >= 20 else _UNNOTICED_SMALL
        noticed = int(count > 1 and rng.random() < share)
    doubts = rng.random() < (_DOUBT_PRODUCT if last.sign in "*/" else _DOUBT)
    doubt_after = rng.randrange(count) if count and doubts else -1
    for number in range(count):
        writer.line(rng.choice(_SWITCHES))
        if wrong is not None and number < noticed:
            writer.line(_check(number, [*equations[:-1], wrong]), wrong.value)
            writer.line(f"That gives {wrong.value} again.", wrong.value)
            continue
        if wrong is not None and number == noticed:
            writer.line(_check(number, equations))
            writer.line(f"Wait, {last}, not {wrong.value}. So it is {last.value}.", last.value)
            continue
        writer.line(_check(number, equations))
        writer.line(f"That gives {last.value} again.", last.value)
        if number == doubt_after:
            writer.line(_doubt(rng, last))
    writer.line(f"The answer is {last.value}.", last.value)
    point = AnswerPoint(writer.determined_at, writer.changes > 0, count)
    return f"{writer.text}{CLOSE_TAG}\n{final}", point


def chain_problem(rng: random.Random, steps: int) -> Problem:
    """Draws one word problem of exactly `steps` steps whose solution is a chain, of any split.

    `Problem.metadata` holds the fields of its `AnswerPoint`.

    Raises:
        DeliberateError: `steps` outside 1..6.
    """
    drawn = word_problem(rng, steps)
    assert drawn.solution is not None  # the grammar always writes one
    solution, point = write_chain(rng, drawn.solution)
    return Problem(
        id=drawn.id.replace("words/", f"{CHAINS}/"),
        question=drawn.question,
        answer=drawn.answer,
        solution=solution,
        source=CHAINS,
        difficulty=steps,
        subject=drawn.subject,
        metadata=vars(point),
    )


def chain_problems(
    split: str, *, size: int, seed: int = 0, steps: tuple[int, int] = (MIN_STEPS, MAX_STEPS)
) -> Iterator[Problem]:
    """Yields `size` distinct problems of a split, steps cycling evenly through the range.

    The split of a problem is that of its question, as in `word_problems`.
    """
    yield from distinct_problems(chain_problem, f"{CHAINS}:{split}:{seed}", split, size, steps)
