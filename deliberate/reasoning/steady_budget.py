"""What a budget's constraint does to several tokens to come, as long as it stays the same.

Far from every limit the constraint changes scores in one way, token after token: an end token's
probability goes to the closing tag, suppressed words are left out. The executor can then choose
several tokens in one call. Those at which the constraint changes, such as the one that ends the
reasoning, are left to `ReasoningConstraint.mask`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from deliberate.engine.constraints import SteadyMask
from deliberate.kernels.native_sampling import ScoreRules
from deliberate.reasoning.budget_state import FORBIDDEN, LONGEST_CHARACTER, Phase, State
from deliberate.reasoning.marks import ReasoningMarks


@functools.lru_cache(maxsize=64)
def reasoning_rules(
    marks: ReasoningMarks,
    ends: tuple[int, ...],
    suppressed: tuple[tuple[int, ...], ...],
    extension: tuple[int, ...],
    greedy: bool,
) -> ScoreRules:
    """Of tokens of the reasoning.

    Args:
        ends: end tokens, whose probability the closing tag gets.
        extension: what the closing tag gives way to; empty: nothing.
        greedy: the targets get the highest of the scores.
    """
    tag, until = marks.closing, marks.call[-1:]
    # Where the tag begins or ends in another form is left to `ReasoningConstraint`.
    until += tuple(sorted((marks.closes[0] | marks.closes[-1]) - {tag[0], tag[-1]}))
    moves = [(-1, ends)] if ends else []
    if extension:
        moves.append((extension[0], tag[:1]))
        until += extension[:1] + tag[:1]
    return ScoreRules(suppressed, tuple(moves), tag, until, summed=not greedy)


@functools.lru_cache(maxsize=64)
def answer_rules(reopening: tuple[int, ...]) -> ScoreRules:
    """Of tokens of an answer that has begun: the opening tag does not come again."""
    return ScoreRules((reopening,) if reopening else ())


def move_probability(scores: Tensor, sources: Sequence[int], target: int, *, summed: bool) -> None:
    """Gives the probability of the sources to the target, in place.

    Args:
        scores: ``[V]``.
        sources, target: token ids.
        summed: the target gets the sum; else the highest of the scores.
    """
    both: list[float] = scores[[*sources, target]].tolist()
    most = max(both)
    if summed and most > FORBIDDEN:
        # In double precision, as the C++ kernels do, so that both have the same sum.
        most += math.log(sum(math.exp(score - most) for score in both))
    scores[list(sources)] = FORBIDDEN
    scores[target] = most


class Limits(Protocol):
    """What is read of `BudgetSettings`."""

    @property
    def extensions(self) -> int: ...
    @property
    def extension(self) -> tuple[int, ...]: ...
    @property
    def suppressed(self) -> tuple[tuple[int, ...], ...]: ...


def steady_mask(
    limits: Limits,
    marks: ReasoningMarks,
    ends: Sequence[int],
    greedy: bool,
    state: State,
    tokens: Sequence[int],
    left: int,
) -> SteadyMask | None:
    """What holds for tokens after these; None where that is to be asked for each.

    Args:
        limits, marks: of the output.
        ends: end tokens.
        greedy: as of `ReasoningConstraint`.
        state: after the tokens; nothing is forced there.
        tokens: of the output.
        left: tokens that may come before no character of several bytes may begin.
    """
    if state.phase is Phase.BEFORE or (state.phase is Phase.ANSWER and not state.answered):
        return None
    if state.phase is Phase.ANSWER:
        rules, matched = answer_rules(marks.reopening or marks.opening), 0
    else:
        extension: tuple[int, ...] = ()
        matched = state.matched
        if state.extended < limits.extensions:
            # The tag gives way where it would begin, and where there is room for the extension.
            extension = limits.extension
            left = 0 if matched else min(left, left + LONGEST_CHARACTER - len(extension))
        rules = reasoning_rules(marks, tuple(ends), limits.suppressed, extension, greedy)
    if left < 1:
        return None
    recent = tuple(tokens[-rules.recent :]) if rules.recent else ()
    return SteadyMask(left, rules, recent, matched)
