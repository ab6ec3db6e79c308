"""When the deep segments of a batch are run, and for which sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deliberate.utils.errors import DeliberateError


class Blockable(Protocol):
    """A running sequence, as the schedule sees it.

    Attributes:
        blocked: its newest token did not exit and needs a deep pass.
        waited: shallow passes of other sequences since it was blocked.
    """

    blocked: bool
    waited: int


@dataclass(frozen=True)
class DeepSchedule:
    """Trades fewer, fuller deep passes against shorter waiting times.

    Attributes:
        fullness: share of the running sequences that must be blocked.
        max_wait: most shallow passes of others that a blocked sequence waits for.
        join: a sequence that is not blocked joins a deep pass from this share of its allowed
            pending tokens on; above 1 none joins.
    """

    fullness: float = 0.75
    max_wait: int = 8
    join: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.fullness <= 1.0:
            raise DeliberateError(
                f"schedule fullness {self.fullness} is outside (0, 1], a share of the sequences"
            )
        if self.max_wait < 0:
            raise DeliberateError(f"schedule max_wait {self.max_wait}: it must be at least 0")
        if self.join <= 0.0:
            raise DeliberateError(
                f"schedule join {self.join}: it must be above 0; above 1 no sequence joins"
            )

    def is_due(self, active: Sequence[Blockable]) -> bool:
        """Whether enough of the running sequences are blocked, or one has waited long enough."""
        blocked = [sequence.waited for sequence in active if sequence.blocked]
        if not blocked:
            return False
        return len(blocked) >= self.fullness * len(active) or max(blocked) >= self.max_wait
