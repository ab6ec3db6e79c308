"""A chain of drafts by a draft layer while it is made, one draft after another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deliberate.kernels.draft_rules import ChainRule


class Chain:
    """Drafts of one sequence.

    Where the first draft is also the first that was looked up, those are taken: they cost nothing,
    and that both agree makes them likely.

    Args:
        source: whose they are, `deliberate.engine.layer_drafts.LayerDrafts`.
        states, tokens: what is written first: ``[n, d]``, and the tokens after these positions.
        rule: how far it goes, by what was known at its beginning.
        found: what was looked up.

    Attributes:
        drafts, confidences: so far.
        looked_up: drafts that were.
        verified: entries without drafts.
    """

    def __init__(
        self, source: Any, states: Tensor, tokens: list[int], rule: ChainRule, found: list[int]
    ) -> None:
        self.source, self.states, self.tokens = source, states, tokens
        self.found, self._rule = found, rule
        self.drafts: list[int] = []
        self.confidences: list[float] = []
        self.looked_up = 0
        self.verified = source.entries + len(tokens)
        self._survives = 1.0  # probability that all drafts are accepted

    def continues(self, token: int, confidence: float) -> bool:
        """Takes a draft, if verifying it pays; whether drafting another does."""
        if not self.drafts and self.found and self.found[0] == token:
            self.drafts, self.looked_up = list(self.found), len(self.found)
            return False
        self._survives = self._rule.survives(self._survives, confidence)
        if self.drafts and not self._rule.keeps(self._survives):
            return False
        self.drafts.append(token)
        self.confidences.append(confidence)
        return self._rule.makes_another(len(self.drafts), self._survives)
