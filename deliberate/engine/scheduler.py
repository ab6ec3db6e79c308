"""When the deep segments of a batch are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.engine.sequence import DecodingSequence
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class DeepSchedule:
    """Fewer and fuller deep passes against shorter waits.

    Attributes:
        fullness: share of the running sequences that must be blocked.
        max_wait: shallow passes that a blocked sequence waits at most.
        join: a sequence that could go on shallow joins a deep pass when so large a share of the
            allowed pending tokens wait; above 1 none joins.
    """

    fullness: float = 0.75
    max_wait: int = 8
    join: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.fullness <= 1.0:
            raise DeliberateError(f"schedule fullness {self.fullness} is outside (0, 1]")
        if self.max_wait < 0:
            raise DeliberateError(f"schedule max_wait {self.max_wait} must be at least 0")
        if self.join <= 0.0:
            raise DeliberateError(f"schedule join {self.join} must be above 0")

    def is_due(self, active: Sequence[DecodingSequence]) -> bool:
        """Whether enough of the running sequences are blocked, or one has waited long enough."""
        blocked = [sequence.waited for sequence in active if sequence.blocked]
        if not blocked:
            return False
        return len(blocked) >= self.fullness * len(active) or max(blocked) >= self.max_wait
