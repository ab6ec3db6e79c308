"""A version that has just gone live beside the one before it: a spike of latency shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from deliberate.serving.pace import Pace
from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class ProbationSettings:
    """When a version is too slow.

    Attributes:
        seconds: after going live, for which it is watched.
        times: how much longer its tokens may take than those of the version before.
        steps: of either version at a load, before the two are compared there.
        looks: in a row that must find it too slow.

    Raises:
        DeliberateError: a value that is not allowed.
    """

    seconds: float = 600.0
    times: float = 2.0
    steps: int = 200
    looks: int = 6

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.times > 1 and self.steps >= 1 and self.looks >= 1):
            raise DeliberateError(f"{self}: seconds above 0, times above 1, the others from 1")


class Probation:
    """Watches one version.

    Tokens are compared at equal loads (powers of two of running requests), so that more traffic is
    not taken for a slower version. What slows the whole machine is.

    Args:
        pace: of the version that went live.
        before: of the version before it.
        settings: limits.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        pace: Pace,
        before: Pace,
        settings: ProbationSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace, self._before = pace, before
        self._settings = settings or ProbationSettings()
        self._clock = clock
        self._until = clock() + self._settings.seconds
        self._slow = 0

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return self._clock() >= self._until

    def look(self) -> str | None:
        """Why the version is to be rolled back; None where it is not."""
        one = self._settings
        ratio = None if self.over else self._pace.ratio(self._before, one.steps)
        self._slow = self._slow + 1 if ratio is not None and ratio > one.times else 0
        if self._slow < one.looks:
            return None
        return (
            f"its tokens take {ratio:.2f} times as long as those of the version before at the same "
            f"load; {one.times:g} are allowed"
        )
