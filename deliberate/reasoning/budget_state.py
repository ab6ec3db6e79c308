"""Where an output with reasoning is, token by token: what the budget's rules read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FORBIDDEN = float("-inf")
"""Score of a token that may not come next."""
LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""


class Phase(StrEnum):
    """Where an output is."""

    BEFORE = "before"
    REASONING = "reasoning"
    ANSWER = "answer"


@dataclass(frozen=True)
class State:
    """After some tokens: what the rules read.

    Attributes:
        phase: where the output is.
        count: tokens of reasoning so far.
        matched: tokens of the tag that comes next, as far as the newest ones have begun it.
        closing: whether the rest of the handover must follow.
        need: bytes that the newest character still lacks.
        extended: extensions so far.
        extending: tokens of an extension that have been made, while it is.
        answered: the answer has a token that is not blank.
    """

    phase: Phase
    count: int = 0
    matched: int = 0
    closing: bool = False
    need: int = 0
    extended: int = 0
    extending: int = 0
    answered: bool = False
