"""A multi-level feedback queue: shortest predicted remaining time first, with aging.

Requests are ranked by what they still need (shortest remaining processing time, which minimises
the mean time in a queue), on a scale of levels: 50 ms, 200 ms, 1 s and more, the latency tiers.
Feedback is the prediction itself, made again at every plan from what a request has got so far: one
that runs longer than requests like it is predicted to run longer still, and falls. Waiting lifts a
request by one level every `aging` seconds. Interactive requests, and those with a deadline that can
be met, count as shorter by `weight`; batch requests rank below all levels and leave rows to others.
A short request whose deadline is near pre-empts: steps run it alone until it is safe or has ended.

What is guaranteed, and tested on a simulated clock: a request is never overtaken by one of the same
priority that comes more than `FeedbackSettings.bound` after it, and `aging` more for each level of
priority between them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.step_plan import RequestView, SequenceView, StepPlan, Traffic
from deliberate.utils.errors import DeliberateError

View = RequestView | SequenceView


class RemainingTime(Protocol):
    """Predicts how long requests still run."""

    def see(self, views: Sequence[View]) -> None:
        """All unfinished requests of a plan; those that are missing since the last have ended."""
        ...

    def seconds(self, view: View, running: int) -> float:
        """Of one request while so many are decoded, waiting not counted."""
        ...


@dataclass(frozen=True)
class FeedbackSettings:
    """How requests are ranked.

    Attributes:
        levels: seconds of remaining time that end each level, ascending; there is one more.
        weight: by which latency-sensitive requests count as shorter, at least 1.
        aging: seconds of waiting that are worth one level, above 0.
        batch_share: of the rows that batch requests may take, in (0, 1]; at least one.
        max_wait: longest time in seconds that a request waits for others, to be prefilled with them
            in one pass while other sequences decode; latency-sensitive ones never do.
        group: waiting requests that end this wait.
        pressure: a request of the first level whose deadline gives it less than so many times what
            it still needs beside the others is run without them, as long as that is enough.
        alone: most steps in a row that run such requests only; the next runs all.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    levels: tuple[float, ...] = (0.05, 0.2, 1.0)
    weight: float = 1.5
    aging: float = 1.0
    batch_share: float = 0.5
    max_wait: float = 0.05
    group: int = 4
    pressure: float = 2.0
    alone: int = 8

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((0.0, *self.levels), self.levels, strict=False))
        if not self.levels or not ascending:
            raise DeliberateError(f"levels {self.levels}: give ascending seconds above 0")
        if not 1.0 <= self.weight < math.inf:
            raise DeliberateError(f"weight {self.weight} must be at least 1")
        if not 0.0 < self.aging < math.inf:
            raise DeliberateError(f"aging {self.aging} must be more than 0 s")
        if not 0.0 < self.batch_share <= 1.0:
            raise DeliberateError(f"batch_share {self.batch_share} is outside (0, 1]")
        if not 0.0 <= self.max_wait < math.inf:
            raise DeliberateError(f"max_wait {self.max_wait} must be 0 s or more")
        if self.group < 1:
            raise DeliberateError(f"group {self.group} must be at least 1")
        if not 0.0 <= self.pressure < math.inf or self.alone < 0:
            raise DeliberateError(
                f"pressure {self.pressure} and alone {self.alone} must be 0 or more"
            )

    @property
    def bound(self) -> float:
        """Seconds after a request from which on none that comes can overtake it."""
        return (len(self.levels) + 2) * self.aging

    def place(self, now: float, view: View, seconds: float) -> float:
        """Where a request that still needs so many seconds stands before aging, from 0 up to
        ``len(levels) + 2``: the level, and how far it is through the level."""
        if view.traffic is Traffic.BATCH:
            return len(self.levels) + 1 + seconds / (1 + seconds)
        if view.deadline is not None:
            slack = view.deadline - now - seconds
            # One that can no longer be met counts no more: serving it first makes others late.
            if slack >= 0:
                seconds = min(seconds / self.weight, slack)
        elif view.traffic is Traffic.INTERACTIVE:
            seconds /= self.weight
        level = bisect_right(self.levels, seconds)
        if level == len(self.levels):
            over = seconds - self.levels[-1]
            return level + over / (1 + over)
        below = self.levels[level - 1] if level else 0.0
        return level + (seconds - below) / (self.levels[level] - below)


class FeedbackScheduler(Scheduler):
    """Plans steps by predicted remaining time.

    Args:
        settings: limits of a step.
        feedback: the levels.
        remaining: predicts; told of every plan.
    """

    def __init__(
        self,
        settings: SchedulerSettings | None,
        feedback: FeedbackSettings,
        remaining: RemainingTime,
    ) -> None:
        super().__init__(settings, rank_by=self._ranked)
        self.feedback = feedback
        self._remaining = remaining
        self._seconds: dict[int, float] = {}
        self._exclusive = 0  # steps in a row

    def plan(
        self,
        now: float,
        waiting: Sequence[RequestView],
        running: Sequence[SequenceView],
        free_blocks: int | None = None,
    ) -> StepPlan:
        """The next step, as `Scheduler.plan`."""
        views: list[View] = [*waiting, *running]
        self._remaining.see(views)
        count = max(1, len(running))
        self._seconds = {one.id: self._remaining.seconds(one, count) for one in views}
        plan = super().plan(now, self._admissible(now, waiting, running), running, free_blocks)
        urgent = {one.id for one in views if self._is_urgent(now, one, count)}
        if not urgent or self._exclusive >= self.feedback.alone or plan.preempt or plan.stalled:
            self._exclusive = 0
            return plan
        bound = self.feedback.bound  # who has waited so long is overtaken by nobody
        first = urgent | {one.id for one in waiting if now - one.arrival >= bound}
        prefill = [chunk for chunk in plan.prefill if chunk[0] in first]
        shallow = [number for number in plan.shallow if number in urgent]
        if not (prefill or shallow):
            self._exclusive = 0
            return plan
        others = len(plan.prefill) + len(plan.shallow) > len(prefill) + len(shallow)
        self._exclusive = self._exclusive + 1 if others else 0
        plan.prefill, plan.shallow = prefill, shallow
        return plan

    def _is_urgent(self, now: float, view: View, count: int) -> bool:
        """Whether a request's deadline is kept only, or more surely, where the others wait."""
        if view.deadline is None or view.traffic is Traffic.BATCH:
            return False
        beside, left = self._seconds[view.id], view.deadline - now
        if not beside > 0.0 or left >= self.feedback.pressure * beside:
            return False
        own = self._remaining.seconds(view, 1)
        return own <= min(left, self.feedback.levels[0])

    def _ranked(self, now: float, view: View) -> float:
        place = self.feedback.place(now, view, self._seconds.get(view.id, 0.0))
        return place - view.priority - (now - view.arrival) / self.feedback.aging

    def _admissible(
        self, now: float, waiting: Sequence[RequestView], running: Sequence[SequenceView]
    ) -> Sequence[RequestView]:
        """The waiting requests that this step may admit."""
        feedback = self.feedback
        if not waiting or self._gathers(now, waiting, running):
            return ()
        taken = sum(one.traffic is Traffic.BATCH for one in running)
        room = max(1, int(feedback.batch_share * self.settings.max_running)) - taken
        batch = [
            (self._ranked(now, one), one.id)
            for one in waiting
            if one.traffic is Traffic.BATCH and now - one.arrival < feedback.bound
        ]
        held = {number for _, number in sorted(batch)[max(0, room) :]}
        return [one for one in waiting if one.id not in held] if held else waiting

    def _gathers(
        self, now: float, waiting: Sequence[RequestView], running: Sequence[SequenceView]
    ) -> bool:
        """Whether a few that have just come wait for more, while others decode."""
        feedback = self.feedback
        return (
            len(waiting) < feedback.group
            and any(view.length >= view.tokens for view in running)
            and all(
                now - one.arrival < feedback.max_wait
                and one.deadline is None
                and one.traffic is not Traffic.INTERACTIVE
                for one in waiting
            )
        )
