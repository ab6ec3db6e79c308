"""The text of an output that reasons before it answers, its reasoning apart from its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.marks import Forms, ReasoningMarks, written
from deliberate.serving.text import AnswerText


class ReasoningText:
    """As `AnswerText`, for an output with tags: they are in neither text.

    What may become a tag is held back until it is decided. Stop strings end the answer; the
    reasoning may hold them. Blanks between the closing tag and the answer are left out.

    Args:
        tokenizer: turns ids into text.
        marks: of the output, as its prompt has left it.
        stops: strings that end the answer.
        apart: whether the reasoning is handed out apart; else all of it, with its tags, is the
            answer's text, and its tokens are counted alone.

    Attributes:
        token_count: tokens up to the one that completed a stop string, or all so far.
        is_reasoning: whether the text that was handed out last is of the reasoning.
    """

    def __init__(
        self, tokenizer: Any, marks: ReasoningMarks, stops: Sequence[str] = (), *, apart: bool
    ) -> None:
        self.token_count = 0
        self.is_reasoning = False
        self._answer = AnswerText(tokenizer, stops)
        self._reasoning = AnswerText(tokenizer)
        self._chain = ChainTokens(marks)
        self._marks = marks
        self._call: Forms = tuple(frozenset([token]) for token in marks.call)
        self._apart = apart
        self._held: list[int] = []
        self._reasons = not marks.opening
        self._leading = False  # blanks of the answer are left out

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._answer.stopped

    @property
    def length(self) -> int:
        """Characters of the answer so far, those held back by its stop strings included."""
        return self._answer.length

    @property
    def reasoning_tokens(self) -> int:
        """Tokens between the tags so far."""
        return len(self._chain.reasoning)

    def push(self, token: int) -> str:
        """The text that can be handed out once `token` is there."""
        if self.stopped:
            return ""
        self.token_count += 1
        self._chain.add(token)
        if not self._apart:
            return self._answer.push(token)
        self.is_reasoning = self._reasons
        self._held.append(token)
        marks = self._may_come
        for tag in marks:
            if written(self._held, tag):
                return self._turn(tag)
        keep = max((_begun(self._held, tag) for tag in marks), default=0)
        cut = len(self._held) - keep
        decided, self._held = self._held[:cut], self._held[cut:]
        return self._say(decided)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        self.is_reasoning = self._reasons
        text, self._held = self._say(self._held), []
        return text + (self._reasoning if self._reasons else self._answer).finish()

    @property
    def _may_come(self) -> list[Forms]:
        """What may begin the reasoning or end it, here; none once it has ended."""
        marks = self._marks
        if self._reasons:
            return [marks.closes, self._call] if self._call else [marks.closes]
        return [] if self._chain.closed or not marks.opens else [marks.opens]

    def _turn(self, tag: Forms) -> str:
        """A tag is complete: the reasoning begins, or ends."""
        decided = self._held[: -len(tag)]
        # The first tokens of a call are the answer's: they are said with its next ones.
        self._held = list(self._marks.call) if self._reasons and tag is self._call else []
        text = self._say(decided)
        if self._reasons:
            text += self._reasoning.finish()
            self._leading = True
        self._reasons = not self._reasons
        return text

    def _say(self, tokens: Sequence[int]) -> str:
        into = self._reasoning if self._reasons else self._answer
        text = "".join(into.push(token) for token in tokens)
        if self._leading and not self._reasons:
            text = text.lstrip()
            self._leading = not text
        return text


def _begun(tokens: Sequence[int], tag: Forms) -> int:
    """How many tokens of a tag the newest tokens have begun, short of all of it."""
    return next((n for n in range(len(tag) - 1, 0, -1) if written(tokens, tag[:n])), 0)
