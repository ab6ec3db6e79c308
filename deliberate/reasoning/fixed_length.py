"""Cuts every chain at one length: the control that a rule for stopping must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.reasoning.stop_policy import Action, Continue, Quiet, Stop, Trial
from deliberate.utils.checks import at_least


@dataclass(frozen=True)
class FixedLengthSettings:
    """Where chains are cut.

    Attributes:
        tokens: of reasoning, at most.
    """

    tokens: int = 256

    def __post_init__(self) -> None:
        at_least("tokens", self.tokens, 1)


class FixedLength:
    """The rule on one chain."""

    def __init__(self, settings: FixedLengthSettings) -> None:
        self.settings = settings

    def due(self, tokens: Sequence[int]) -> bool:
        """At the length."""
        return len(tokens) >= self.settings.tokens

    def quiet(self, tokens: Sequence[int]) -> Quiet:
        """Until the length."""
        return Quiet.for_tokens(max(0, self.settings.tokens - 1 - len(tokens)))

    def on_step(self, tokens: Sequence[int]) -> Action:
        """`Stop`."""
        return Stop(f"cut at {self.settings.tokens} tokens")

    def on_probe(self, trial: Trial) -> Action:
        """It asks for no probes."""
        return Continue()
