"""What a variant of `deliberate bench rate` does at a budget of mean seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deliberate.eval.benchmarks.rate_online import Levels, in_share
from deliberate.reasoning.rate_replay import NOTHING, Spent
from deliberate.reasoning.rates import ProblemChains, rate_for

# A problem's chains by fidelity.
Problem = Mapping[str, ProblemChains]
Play = Callable[[Problem], Spent]


@dataclass(frozen=True)
class Setting:
    """What a variant does with a problem.

    Attributes:
        name: in the table.
        play: what it spends on a problem.
        levels: how a problem is decoded so; None: not at all, or by a fixed rule.
    """

    name: str
    play: Play
    levels: Levels | None = None


UNANSWERED = Setting("unanswered", lambda problem: NOTHING)
"""What a variant does with a share of the problems where no other setting fits a budget."""


@dataclass(frozen=True)
class Choice:
    """What a variant does at a budget: between two settings, one for a share of the problems.

    Attributes:
        setting: of the others.
        dearer: of the share, which makes the mean seconds those of the budget.
        share: in [0, 1].
    """

    setting: Setting
    dearer: Setting | None = None
    share: float = 0.0

    @property
    def name(self) -> str:
        """In the table."""
        if self.dearer is None:
            return self.setting.name
        return f"{self.setting.name}; {self.share:.0%} {self.dearer.name}"

    def spend(self, problems: Sequence[Problem]) -> list[Spent]:
        """On each problem."""
        return [
            (self.dearer if self.dearer and in_share(number, self.share) else self.setting).play(p)
            for number, p in enumerate(problems)
        ]


def choose(
    budget: float, settings: Sequence[Setting], tried: Sequence[Sequence[Spent]]
) -> Choice | None:
    """The setting, or the two, with the most right answers within a budget; None: none fits.

    Args:
        budget: mean seconds.
        settings: of a variant.
        tried: of each, what it spent on the same problems.
    """
    points = [(mean_seconds(done), share_right(done)) for done in tried]
    place = rate_for(budget, range(len(points)), [s for s, _ in points], [r for _, r in points])
    if place is None:
        return None
    best, most = Choice(settings[int(place)]), points[int(place)][1]
    for (seconds, right), cheaper in zip(points, settings, strict=True):
        for (more, better), dearer in zip(points, settings, strict=True):
            if seconds <= budget < more:
                share = (budget - seconds) / (more - seconds)
                if (mean := right + share * (better - right)) > most + 1e-9:
                    best, most = Choice(cheaper, dearer, share), mean
    return best


def enough(tried: Sequence[Sequence[Spent]]) -> float:
    """Mean seconds of the cheapest setting of those with the most right answers."""
    best = max(map(share_right, tried))
    return min(mean_seconds(done) for done in tried if share_right(done) == best)


def mean_seconds(done: Sequence[Spent]) -> float:
    """Of a problem."""
    return float(np.mean([one.seconds for one in done]))


def share_right(done: Sequence[Spent]) -> float:
    """Of the answers."""
    return float(np.mean([one.right for one in done]))
