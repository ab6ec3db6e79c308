"""The give-up rule: a chain that repeats itself will not finish, and is stopped and marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.reasoning.stop_policy import Action, Continue, Quiet, Stop, Trial, until_multiple
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class GiveUpSettings:
    """When a chain is given up.

    Attributes:
        window: newest tokens that are looked at.
        share: of the window's n-grams that stood in it before, from which on the chain is given
            up, in (0, 1].
        gram: n.
        every: tokens between two looks.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    window: int = 128
    share: float = 0.8
    gram: int = 4
    every: int = 32

    def __post_init__(self) -> None:
        for name in ("gram", "every"):
            at_least(name, getattr(self, name), 1)
        at_least("window", self.window, 2 * self.gram)
        if not 0.0 < self.share <= 1.0:
            raise DeliberateError(f"share={self.share} must be in (0, 1]")


def repeated_share(tokens: Sequence[int], gram: int) -> float:
    """Share of the n-grams of `tokens` that stood earlier in them; 0 for fewer than n tokens."""
    grams = [tuple(tokens[i : i + gram]) for i in range(len(tokens) - gram + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class GiveUp:
    """The rule on one chain."""

    def __init__(self, settings: GiveUpSettings) -> None:
        self.settings = settings

    def due(self, tokens: Sequence[int]) -> bool:
        """Every `every` tokens, once the window is full."""
        return len(tokens) >= self.settings.window and len(tokens) % self.settings.every == 0

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """Until its next look."""
        window, every = self.settings.window, self.settings.every
        first = max(0, window - 1 - len(tokens))
        return Quiet.for_tokens(first + until_multiple(len(tokens) + first, every))

    def on_step(self, tokens: Sequence[int]) -> Action:
        """`Stop` where the window repeats itself."""
        share = repeated_share(tokens[-self.settings.window :], self.settings.gram)
        if share >= self.settings.share:
            return Stop(f"gave up: {share:.0%} of the last tokens repeat", gave_up=True)
        return Continue()

    def on_probe(self, trial: Trial) -> Action:
        """It asks for no probes."""
        return Continue()
