"""How far drafts go: rules that a decode loop sets, and its steps or the C++ kernels follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deliberate.kernels import border

# Classes of confidence, of equal width.
CLASSES = 10


@dataclass(frozen=True)
class ChainRule:
    """How far a chain of drafts by a draft layer goes.

    With S the probability that all drafts so far are accepted, a draft is kept while S times
    `token_value` exceeds `token_cost` (the first always), and another is made while S times
    `draft_value` exceeds `draft_cost`.

    Attributes:
        accepts: by tenth of confidence, the probability that a draft is accepted.
        token_value, token_cost: seconds that an accepted draft saves, and that verifying one takes.
        draft_value, draft_cost: the same of a draft that is not made yet.
        limit: most drafts.

    Raises:
        BorderError: not one probability per class, or no draft is allowed.
    """

    accepts: tuple[float, ...]
    token_value: float
    token_cost: float
    draft_value: float
    draft_cost: float
    limit: int

    def __post_init__(self) -> None:
        border.same(len(self.accepts), CLASSES, "the number of classes of confidence")
        border.within(self.limit, 1, 1 << 20, "the number of drafts")

    def survives(self, before: float, confidence: float) -> float:
        """S with one more draft, of this confidence."""
        return before * self.accepts[confidence_class(confidence)]

    def keeps(self, survives: float) -> bool:
        """Whether a draft is kept, after another one."""
        return survives * self.token_value > self.token_cost

    def makes_another(self, made: int, survives: float) -> bool:
        """Whether another draft is made after so many."""
        return made < self.limit and survives * self.draft_value > self.draft_cost


@dataclass(frozen=True)
class LookupRule:
    """How many of the tokens that are looked up in the text are drafts.

    Attributes:
        best: how many of 1, 2, ... tokens that were found.
        shortest, longest: newest tokens that must have been there before, and that are compared.
        every, declined: where `best` is 0, one is a draft every so many times, counted from
            `declined` on.
        allowance: passes over one token that drafts may lose now. A draft takes `cost` of it,
            whether it is accepted or not, and an accepted one gives 1; every token gives `earned`.
        most_allowance: that is kept.

    Raises:
        BorderError: nothing can be found, or more drafts than were.
    """

    best: tuple[int, ...]
    shortest: int
    longest: int
    every: int
    declined: int = 0
    allowance: float = math.inf
    cost: float = 0.0
    earned: float = 0.0
    most_allowance: float = math.inf

    def __post_init__(self) -> None:
        border.within(len(self.best), 1, 1 << 20, "the number of drafts")
        for found, best in enumerate(self.best, start=1):
            border.within(best, 0, found, f"the number of drafts of {found} tokens")
        border.within(self.shortest, 1, self.longest, "the tokens that must have been there")
        border.within(self.every, 1, 1 << 40, "the number of times without a draft")
        if not (self.cost >= 0 and self.earned >= 0):
            raise border.BorderError(
                f"a draft costs {self.cost} and a token earns {self.earned}: they must be 0 or more"
            )

    @property
    def most(self) -> int:
        """Drafts of a pass at most."""
        return len(self.best)


def affordable(allowance: float, cost: float, drafts: int) -> int:
    """How many of so many drafts an allowance is enough for; as in `LookupRule`."""
    if allowance >= cost * drafts:
        return drafts
    return int(allowance / cost) if allowance > 0 else 0


def confidence_class(confidence: float) -> int:
    """Its tenth; a confidence that is no number counts as the least."""
    at = confidence * CLASSES
    return CLASSES - 1 if at >= CLASSES - 1 else int(at) if at >= 0 else 0
