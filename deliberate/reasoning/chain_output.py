"""The output of a chain: its reasoning and its answer, and what was done along the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deliberate.reasoning.marks import ReasoningMarks, written


@dataclass(frozen=True)
class ProbeRecord:
    """A probe of a chain.

    Attributes:
        at: tokens of reasoning before it.
        answer: its text.
        confidence: mean probability of its tokens from the second one on.
        tokens: that it cost.
    """

    at: int
    answer: str
    confidence: float
    tokens: int


@dataclass
class ChainResult:
    """A finished chain.

    Attributes:
        tokens: of the output, tags and end token included.
        reasoning_tokens: between the tags.
        answer: text after the closing tag; of an output that never opened its reasoning, all of it.
        stopped: why a policy ended it; None where it ended by itself or by its budget.
        gave_up: a policy ended it because it would not have finished.
        finished: an end token ended the output, not its limit.
        killed: it was ended for want of confidence; it has no answer then.
        confidences: of its tokens, where they were watched.
        probes: in their order.
        rolled_back: tokens of reasoning that were made and removed again, or were those of
            continuations that a fork did not keep.
        forks: how often one of several continuations was chosen.
        triggers: tokens of the output at which a watch of the hidden states was triggered.
        reweighed: tokens of the output that it re-weighed.
        seconds: from the call to its end, together with what else ran.
    """

    tokens: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    answer: str = ""
    stopped: str | None = None
    gave_up: bool = False
    finished: bool = False
    killed: bool = False
    confidences: list[float] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)
    rolled_back: int = 0
    forks: int = 0
    triggers: list[int] = field(default_factory=list)
    reweighed: int = 0
    seconds: float = 0.0

    @property
    def probe_tokens(self) -> int:
        """Tokens that the probes cost."""
        return sum(probe.tokens for probe in self.probes)


class ChainTokens:
    """An output cut into reasoning and answer while it grows.

    Args:
        marks: around the reasoning.
        tokens: made already.

    Attributes:
        output: all tokens.
        reasoning: those between the tags; a closing tag of several tokens is taken out again once
            it is complete.
        answer: those after the closing tag, or before an opening one; of a tool call that ends the
            reasoning all of its own.
    """

    def __init__(self, marks: ReasoningMarks, tokens: Sequence[int] = ()) -> None:
        self._marks = marks
        self.output: list[int] = []
        self.reasoning: list[int] = []
        self.answer: list[int] = []
        self._opened = not marks.opening
        self._closed = False
        for token in tokens:
            self.add(token)

    @property
    def reasons(self) -> bool:
        """Whether the newest token is within the reasoning, of which it may begin the end."""
        return self._opened and not self._closed

    @property
    def closed(self) -> bool:
        """Whether the reasoning has ended."""
        return self._closed

    def add(self, token: int) -> None:
        """The output goes on with this token."""
        marks = self._marks
        self.output.append(token)
        if self._closed or not self._opened:
            self.answer.append(token)
            if not self._opened and written(self.output, marks.opens):
                self._opened = True
                self.answer = []
            return
        self.reasoning.append(token)
        if written(self.reasoning, marks.closes):
            del self.reasoning[-len(marks.closing) :]
            self._closed = True
        elif marks.call and ends_with(self.reasoning, marks.call):
            del self.reasoning[-len(marks.call) :]
            self.answer = list(marks.call)
            self._closed = True


def ends_with(tokens: Sequence[int], run: Sequence[int]) -> bool:
    """Whether the newest tokens are this run."""
    return len(tokens) >= len(run) and tuple(tokens[-len(run) :]) == tuple(run)
