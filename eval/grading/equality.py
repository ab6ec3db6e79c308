"""Whether two answers are the same one, as the grader compares an answer with a reference."""

from __future__ import annotations

import functools

from deliberate.eval.grading.answers import compare_exactly, stated_answer
from deliberate.eval.grading.graders import grade


@functools.lru_cache(maxsize=100_000)
def same_answer(one: str, other: str) -> bool:
    """As `grade` has it, algebra included: in the main thread only."""
    return one == other or (bool(one and other) and grade(one, other, "auto").correct)


@functools.lru_cache(maxsize=10_000)
def same_value(one: str, other: str) -> bool:
    """As the grader has it without algebra, in any thread and in time linear in the texts.

    Numbers are compared as fractions, words without case. Of a text that states its answer, in a
    box or as "The answer is 7.", the answer counts.
    """
    if one == other:
        return True
    first, second = (stated_answer(text) or text.strip() for text in (one, other))
    if not (first and second):
        return False
    found = compare_exactly(first, second, "auto")
    return found is not None and found[0]
