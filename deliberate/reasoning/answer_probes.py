"""Answer probes: stop when the answers that the chain gives along the way agree.

Dynasor-CoT (Fu et al., 2024, arXiv:2412.20993): every `chunk` tokens a fork of the chain is made to
answer in a few tokens; the chain ends when the last `agree` answers are equal, not empty, and hold
no word of doubt. Words are compared as whole words: "no" is not in "now".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deliberate.reasoning.stop_policy import (
    Action,
    Continue,
    Probe,
    Quiet,
    Stop,
    Trial,
    until_multiple,
)
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError

DOUBT = ("wait", "hold", "but", "okay", "no", "hmm")
Same = Callable[[str, str], bool]


def plain_answer(text: str) -> str:
    """An answer without surrounding blanks, marks and a closing full stop, in lower case."""
    return text.strip().strip("*$ \n\t").rstrip(".").strip().lower()


def same_text(one: str, other: str) -> bool:
    """Whether two answers are the same text after `plain_answer`."""
    return plain_answer(one) == plain_answer(other)


@dataclass(frozen=True)
class AnswerProbeSettings:
    """Constants of answer probes.

    Attributes:
        agree: k, how many answers in a row must be equal.
        chunk: tokens between probes.
        answer_tokens: most tokens of a probe's answer.
        doubt: words that an answer must not hold.

    Raises:
        DeliberateError: a number below 1, or a word of doubt that is no word.
    """

    agree: int = 3
    chunk: int = 64
    answer_tokens: int = 20
    doubt: tuple[str, ...] = DOUBT

    def __post_init__(self) -> None:
        for name in ("agree", "chunk", "answer_tokens"):
            at_least(name, getattr(self, name), 1)
        object.__setattr__(self, "doubt", tuple(self.doubt))
        for word in self.doubt:
            if not isinstance(word, str) or not re.fullmatch(r"\w+", word):
                raise DeliberateError(f"doubt has {word!r}: give single words")


class AnswerProbes:
    """The probes of one chain.

    Args:
        settings: the constants.
        same: whether two answers are equal; by default their texts are compared.
    """

    def __init__(self, settings: AnswerProbeSettings, same: Same = same_text) -> None:
        self.settings = settings
        self._same = same
        words = "|".join(map(re.escape, settings.doubt))
        self._doubt = re.compile(rf"\b(?:{words})\b", re.IGNORECASE) if words else None
        self.answers: list[str] = []

    def due(self, tokens: Sequence[int]) -> bool:
        """After every `chunk` tokens."""
        return bool(tokens) and len(tokens) % self.settings.chunk == 0

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """Until the chunk is full."""
        return Quiet.for_tokens(until_multiple(len(tokens), self.settings.chunk))

    def on_step(self, tokens: Sequence[int]) -> Action:
        """A probe."""
        return Probe(self.settings.answer_tokens)

    def on_probe(self, trial: Trial) -> Action:
        """`Stop` where the last answers agree."""
        self.answers.append(trial.text)
        last = self.answers[-self.settings.agree :]
        if len(last) < self.settings.agree or not all(map(plain_answer, last)):
            return Continue()
        if self._doubt is not None and any(self._doubt.search(text) for text in last):
            return Continue()
        if all(self._same(last[0], text) for text in last[1:]):
            return Stop(f"{len(last)} probes agree")
        return Continue()
