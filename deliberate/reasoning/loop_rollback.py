"""A chain that begins to repeat itself goes back to where the loop began, and on another way.

`give_up` ends such a chain; this rule gives it another chance first. The loop is found by n-grams
of tokens: it begins with the first n-gram of those at the end of the chain that all stood in it
before. The chain is rolled back to there, and that n-gram may not occur again. A reasoning that is
not streamed can be rolled back; `deliberate.engine.long_text` re-weighs where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deliberate.reasoning.chain_output import ChainResult, ChainTokens
from deliberate.reasoning.give_up import repeated_share
from deliberate.reasoning.marks import ReasoningMarks
from deliberate.reasoning.stop_policy import (
    Action,
    Continue,
    Quiet,
    Rollback,
    Trial,
    until_multiple,
)
from deliberate.reasoning.token_budget import ReasoningConstraint
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class LoopRollbackSettings:
    """When a chain is rolled back.

    Attributes:
        window: newest tokens that are looked at.
        share: of the window's n-grams that stood in it before, from which on the chain is rolled
            back, in (0, 1].
        gram: n.
        every: tokens between two looks.
        most: how often a chain is rolled back at most.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    window: int = 64
    share: float = 0.5
    gram: int = 6
    every: int = 16
    most: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "most"):
            at_least(name, getattr(self, name), 1)
        at_least("gram", self.gram, 2)
        at_least("window", self.window, 2 * self.gram)
        if not 0.0 < self.share <= 1.0:
            raise DeliberateError(f"share={self.share} must be in (0, 1]")


def loop_begin(tokens: Sequence[int], gram: int) -> int | None:
    """Index of the first token that repeats, of those that do up to the end.

    It ends the first n-gram of the last unbroken run of n-grams that stood in `tokens` before; one
    new token, and so n new n-grams, do not break the run. None where the last n are all new.
    """
    seen: set[tuple[int, ...]] = set()
    begin, newest = None, -gram
    for end in range(gram - 1, len(tokens)):
        run = tuple(tokens[end - gram + 1 : end + 1])
        if run in seen:
            if begin is None or end - newest > gram + 1:
                begin = end
            newest = end
        seen.add(run)
    return begin if begin is not None and len(tokens) - newest <= gram else None


class LoopRollback:
    """The rule on one chain."""

    def __init__(self, settings: LoopRollbackSettings) -> None:
        self.settings = settings
        self._left = settings.most

    def due(self, tokens: Sequence[int]) -> bool:
        """Every `every` tokens, once the window is full and while it may still be rolled back."""
        settings = self.settings
        if not self._left or len(tokens) < settings.window:
            return False
        return len(tokens) % settings.every == 0

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """Until its next look."""
        window, every = self.settings.window, self.settings.every
        first = max(0, window - 1 - len(tokens))
        return Quiet.for_tokens(first + until_multiple(len(tokens) + first, every))

    def on_step(self, tokens: Sequence[int]) -> Action:
        """`Rollback` where the window repeats itself."""
        settings = self.settings
        if repeated_share(tokens[-settings.window :], settings.gram) < settings.share:
            return Continue()
        begin = loop_begin(tokens, settings.gram)
        if begin is None:
            return Continue()
        self._left -= 1
        run = tuple(tokens[begin - settings.gram + 1 : begin + 1])
        return Rollback(len(tokens) - begin, run)

    def on_probe(self, trial: Trial) -> Action:
        """It asks for no probes."""
        return Continue()


class Running(Protocol):
    """What is rolled back of a chain that runs.

    Attributes:
        request: a `ChainRequest`.
        tokens: its output.
        constraint: along it.
        result: of the chain.
    """

    request: Any
    tokens: ChainTokens
    constraint: ReasoningConstraint
    result: ChainResult


def roll_back(chain: Running, action: Rollback, marks: ReasoningMarks) -> None:
    """Removes the newest tokens of a chain, whose reasoning must not hold the run from now on.

    Where they begin within a character, all of it is removed: the run ends with its first token.
    """
    before, avoid = chain.tokens.output, action.avoid
    output = before[: len(before) - action.count]
    chain.constraint.follow(output)
    while chain.constraint.within_character:
        first = output.pop()
        avoid = (*output[max(0, len(output) - len(avoid) + 1) :], first)
        chain.constraint.follow(output)
    chain.tokens = ChainTokens(marks, output)
    del chain.result.confidences[len(output) :]
    chain.result.rolled_back += len(before) - len(output)
    budget = chain.request.budget
    kept = replace(budget, suppressed=(*budget.suppressed, avoid))
    chain.request = replace(chain.request, budget=kept)
