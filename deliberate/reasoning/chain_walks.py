"""Walks along recorded chains: the probes at which a rule looks, and what they answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.reasoning.answer_probes import Same, plain_answer, same_text
from deliberate.reasoning.recorded_chains import RecordedChain
from deliberate.utils.checks import at_least, text_list


@dataclass(frozen=True)
class LookPlaces:
    """Where a chain is looked at.

    Attributes:
        chunk: least tokens from one probe to the next.
        boundaries: texts that end a line or a step; a probe is made there alone. Empty: at any
            token.
        answer_tokens: most tokens of a probe's answer.
    """

    chunk: int = 32
    boundaries: tuple[str, ...] = ("\n", ".\n", "\n\n", ".\n\n")
    answer_tokens: int = 20

    def __post_init__(self) -> None:
        at_least("chunk", self.chunk, 1)
        at_least("answer_tokens", self.answer_tokens, 1)
        object.__setattr__(self, "boundaries", text_list("boundaries", self.boundaries))


@dataclass(frozen=True)
class Look:
    """One probe of a walk along a chain.

    Attributes:
        at: tokens of reasoning before it.
        answer: its text.
        confidence: of the answer, in [0, 1].
        streak: equal answers in a row, this one included; 0 for an empty one.
        tokens: that it cost.
        same: the answer is the whole chain's.
        right: it is the reference's; None where that is not known.
    """

    at: int
    answer: str
    confidence: float
    streak: int
    tokens: int
    same: bool
    right: bool | None


@dataclass(frozen=True)
class Walk:
    """All probes of a chain at the places of a rule, and what the whole chain gave.

    Attributes:
        looks: in order.
        tokens: of reasoning of the whole chain.
        right: the whole chain's answer is the reference's; None where that is not known.
    """

    looks: tuple[Look, ...]
    tokens: int
    right: bool | None


class Streak:
    """Counts equal answers in a row."""

    def __init__(self, same: Same = same_text) -> None:
        self._same = same
        self._last = ""
        self.count = 0

    def add(self, answer: str) -> int:
        """The number of equal answers in a row, this one included; 0 for an empty one."""
        if not plain_answer(answer):
            self.count = 0
        else:
            equal = self.count > 0 and self._same(self._last, answer)
            self.count = self.count + 1 if equal else 1
        self._last = answer
        return self.count


def walk(
    chain: RecordedChain,
    places: LookPlaces,
    endings: Sequence[tuple[int, ...]],
    same: Same = same_text,
) -> Walk:
    """The recorded probes at which a rule would look.

    Args:
        chain: recorded with probes at these places at least; others are left out.
        places: of the rule.
        endings: ids of `places.boundaries`.
        same: whether two answers are equal.
    """
    looks: list[Look] = []
    streak, last = Streak(same), 0
    for probe in chain.probes:
        if probe.at - last < places.chunk:
            continue
        if endings and not any(
            chain.tokens[max(0, probe.at - len(run)) : probe.at] == run for run in endings
        ):
            continue
        last = probe.at
        answer = probe.answer
        looks.append(
            Look(
                probe.at,
                answer,
                probe.confidence,
                streak.add(answer),
                probe.tokens,
                answer == chain.answer or same(answer, chain.answer),
                None if chain.expected is None else bool(answer) and same(answer, chain.expected),
            )
        )
    right = None
    if chain.expected is not None:
        right = bool(chain.answer) and same(chain.answer, chain.expected)
    return Walk(tuple(looks), len(chain.tokens), right)
