"""What drafts several passes of one sequence in one call of the executor."""

from __future__ import annotations

from dataclasses import dataclass

from deliberate.config import MAX_CALL_STEPS
from deliberate.kernels.draft_rules import LookupRule
from deliberate.kernels.native_drafted import LayerPart, ModelPart

# Seconds of processor time of one call, about: the loop hears of its tokens at its end.
CALL_SECONDS = 0.05


@dataclass(frozen=True)
class DraftPlan:
    """Where the drafts of some passes come from; estimates stay as they are meanwhile.

    Attributes:
        layer: a draft layer, or None.
        lookup: how many of the looked-up tokens are drafts, or None.
        passes: most passes.
        model: layers that draft over the sequence's own keys and values, or None.
    """

    layer: LayerPart | None
    lookup: LookupRule | None
    passes: int
    model: ModelPart | None = None

    @property
    def widest(self) -> int:
        """Drafts of a pass at most."""
        chains = [part.rule.limit for part in (self.layer, self.model) if part is not None]
        return max(*chains, 0, 0 if self.lookup is None else self.lookup.most)


def call_passes(single: float | None) -> int:
    """Passes of one call, where one over a single token takes so many seconds; 1 if not known."""
    if single is None:
        return 1
    return max(1, min(MAX_CALL_STEPS, int(CALL_SECONDS / max(single, 1e-9))))
