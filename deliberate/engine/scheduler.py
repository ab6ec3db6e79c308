"""Which prompts, shallow passes and deep passes a step runs: a pure function of what it is told.

Prompts are prefilled in chunks beside decoding (Sarathi-Serve, arXiv:2403.02310), so that a long
prompt delays the tokens of others by one chunk at most. Deep passes wait until they are full. When
blocks run out, sequences are preempted and later recomputed (vLLM, arXiv:2309.06180).

What is guaranteed, and tested on a simulated clock:

- a blocked sequence gets its deep pass after `DeepSchedule.max_wait` plans, or in the first plan
  that is `DeepSchedule.max_seconds` after it was blocked;
- a request is never overtaken by one that comes more than ``patience`` after it, and ``aging`` more
  for each level of priority between them, whatever deadlines are asked for (`rank`); but while a
  better-ranked prefill is about to publish its prefix, it lets others pass;
- a sequence is preempted at most once for each token that it gains, and the first in rank goes on
  in every step once the prefills admitted before it are done, so every request is finished;
- free blocks are never overcommitted, and the prefill of a step never exceeds its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deliberate.engine.step_plan import RequestView, SequenceView, StepPlan
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
        max_seconds: longest time that a blocked sequence waits for, where the clock is read.
    """

    fullness: float = 0.75
    max_wait: int = 8
    join: float = 0.5
    max_seconds: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 < self.fullness <= 1.0:
            raise DeliberateError(
                f"schedule fullness {self.fullness} is outside (0, 1], a share of the sequences"
            )
        if self.max_wait < 0:
            raise DeliberateError(f"schedule max_wait {self.max_wait}: it must be at least 0")
        if not self.join > 0.0:
            raise DeliberateError(
                f"schedule join {self.join}: it must be above 0; above 1 no sequence joins"
            )
        if not self.max_seconds >= 0.0:
            raise DeliberateError(f"schedule max_seconds {self.max_seconds}: it must be at least 0")

    def is_due(self, active: Sequence[Blockable]) -> bool:
        """Whether enough of the running sequences are blocked, or one has waited long enough."""
        blocked = [sequence.waited for sequence in active if sequence.blocked]
        return bool(blocked) and self.due(len(blocked), len(active), max(blocked))

    def due(self, blocked: int, running: int, waited: int) -> bool:
        """The same of counts: at least one is blocked, and the one blocked longest has `waited`."""
        return blocked >= self.fullness * running or waited >= self.max_wait

    def until_due(self, active: Sequence[Blockable]) -> tuple[int, int]:
        """How many more sequences blocked, and how many passes of others, make a deep pass due.

        The passes count from the first that is blocked; at least 1 of each.
        """
        waits = [sequence.waited for sequence in active if sequence.blocked]
        enough = math.ceil(self.fullness * len(active) - 1e-9) - len(waits)
        return max(1, enough), max(1, self.max_wait - max(waits, default=0))


@dataclass(frozen=True)
class SchedulerSettings:
    """Limits of a step and of waiting.

    Attributes:
        max_running: most sequences that are admitted at a time.
        prefill_tokens: most prompt tokens of a step in which other sequences decode.
        idle_prefill_tokens: the same where none does.
        long_share: share of these that one prompt may take while others wait for prefill too, so
            that short prompts pass beside a long one.
        block_tokens: tokens of a block of the cache.
        aging: seconds of waiting that are worth one level of priority.
        patience: seconds after which a request without a deadline is treated as due; a later
            deadline counts as this.
        deep: when deep passes are run.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    max_running: int = 64
    prefill_tokens: int = 256
    idle_prefill_tokens: int = 1024
    long_share: float = 0.75
    block_tokens: int = 16
    aging: float = 2.0
    patience: float = 30.0
    deep: DeepSchedule = field(default_factory=DeepSchedule)

    def __post_init__(self) -> None:
        for name in ("max_running", "prefill_tokens", "block_tokens"):
            if getattr(self, name) < 1:
                raise DeliberateError(
                    f"scheduler {name} {getattr(self, name)}: it must be at least 1"
                )
        if self.idle_prefill_tokens < self.prefill_tokens:
            raise DeliberateError(
                f"scheduler idle_prefill_tokens {self.idle_prefill_tokens}: it must be at least "
                f"prefill_tokens, {self.prefill_tokens}"
            )
        if not 0.0 < self.long_share <= 1.0:
            raise DeliberateError(
                f"scheduler long_share {self.long_share} is outside (0, 1], a share of the prefill"
            )
        for name in ("aging", "patience"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise DeliberateError(
                    f"scheduler {name} {getattr(self, name)}: it must be 0 or more seconds"
                )


Rank = Callable[[float, RequestView | SequenceView], float]
"""(now, view) -> the smaller, the earlier it is served and the later it is preempted."""


def rank(settings: SchedulerSettings) -> Rank:
    """The rank by deadline within a priority, with aging: when a request should have begun.

    ``min(deadline - seconds_left, arrival + patience) - aging * priority``, earliest first. A
    deadline that can no longer be met counts no more: serving it first would only make others late.
    """
    aging, patience = settings.aging, settings.patience

    def of(now: float, view: RequestView | SequenceView) -> float:
        due = view.arrival + patience
        if view.deadline is not None:
            begin = view.deadline - view.seconds_left
            if now <= begin < due:
                due = begin
        return due - aging * view.priority

    return of


class Scheduler:
    """Plans steps; keeps nothing between them.

    Args:
        settings: limits of a step and of waiting.
        rank_by: replaces the rank by deadline, for instance by predicted remaining time.
    """

    def __init__(
        self, settings: SchedulerSettings | None = None, rank_by: Rank | None = None
    ) -> None:
        self.settings = settings or SchedulerSettings()
        self._rank = rank_by or rank(self.settings)

    def plan(
        self,
        now: float,
        waiting: Sequence[RequestView],
        running: Sequence[SequenceView],
        free_blocks: int | None = None,
    ) -> StepPlan:
        """The next step.

        Args:
            now: seconds; the clock of arrivals and deadlines.
            waiting: requests that are not admitted, in any order.
            running: admitted sequences that are not finished, in any order.
            free_blocks: blocks that can be had at once, those of the prefix cache that nobody uses
                included; None where the cache is not made of blocks.

        Raises:
            DeliberateError: one sequence alone needs more blocks than there are; a request that
                long should have been refused by the engine.
        """
        planning = _Planning(self.settings, self._rank, now, free_blocks)
        planning.keep(running)
        if waiting or any(view.length < view.tokens for view in planning.kept):
            planning.prefill(waiting)
        planning.passes()
        if planning.plan.empty and (waiting or running):
            raise DeliberateError(
                f"{len(running)} running and {len(waiting)} waiting sequences cannot go on with "
                f"{free_blocks} free blocks of {self.settings.block_tokens} tokens: one of them "
                "alone needs more; give the cache more blocks or limit the length of requests"
            )
        return planning.plan


class _Planning:
    """One plan while it is made.

    Attributes:
        plan: what is decided so far.
        kept: the running sequences that are not preempted.
        free: blocks that are neither in use nor set aside for a sequence that is kept or admitted.
    """

    def __init__(
        self, settings: SchedulerSettings, rank_of: Rank, now: float, free_blocks: int | None
    ) -> None:
        self._settings = settings
        self._rank = rank_of
        self._now = now
        self._admitted: list[RequestView] = []
        self._bounded = free_blocks is not None
        self.plan = StepPlan()
        self.kept: list[SequenceView] = []
        self.free = 0 if free_blocks is None else free_blocks

    def keep(self, running: Sequence[SequenceView]) -> None:
        """Gives running sequences the blocks of their next step; preempts where they run out."""
        needed = sum(map(self._needed, running)) if self._bounded else 0
        if needed <= self.free:
            self.free -= needed
            self.kept = list(running)
            return
        # What those that may not be preempted need was set aside when they were admitted.
        queue = sorted(
            running, key=lambda one: (one.progressed, self._rank(self._now, one), one.id)
        )
        while queue:
            view = queue.pop(0)
            needed = self._needed(view)
            while needed > self.free and queue and queue[-1].progressed:
                victim = queue.pop()
                self.plan.preempt.append(victim.id)
                self.free += victim.own_blocks
            if needed > self.free:
                self.plan.stalled.append(view.id)
            else:
                self.free -= needed
            self.kept.append(view)

    def prefill(self, waiting: Sequence[RequestView]) -> None:
        """Chunks of admitted and of waiting prompts, which they admit, in the order of rank."""
        settings, plan = self._settings, self.plan
        decoding = any(view.length >= view.tokens for view in self.kept)
        total = settings.prefill_tokens if decoding else settings.idle_prefill_tokens
        longest = max(1, int(settings.long_share * total))
        stalled = set(plan.stalled)
        prompts: list[RequestView | SequenceView] = [
            view for view in self.kept if view.length < view.tokens and view.id not in stalled
        ]
        prompts += waiting
        order = sorted((self._rank(self._now, view), view.id, view) for view in prompts)
        # Blocks go to those that run and rank higher before anyone is admitted.
        worst = max((self._rank(self._now, v) for v in self.kept if v.id in stalled), default=None)
        closed = bool(plan.preempt)
        publishing: set[Hashable] = set()
        chunks: list[list[int]] = []
        for number, (own, _, view) in enumerate(order):
            if total <= 0:
                break
            first = view.length if isinstance(view, SequenceView) else view.cached
            if isinstance(view, RequestView):
                if closed or (view.keys and view.keys[0] in publishing):
                    continue
                # Nobody overtakes the first that does not fit, or long prompts would never run.
                if (worst is not None and own > worst) or not self._admit(own, view):
                    closed = True
                    continue
            count = min(view.tokens - first, total)
            if number + 1 < len(order):
                count = min(count, longest)
            publishing.update(view.keys)
            chunks.append([view.id, first, count, view.tokens - first - count])
            total -= count
        for chunk in chunks:  # what nobody else could use
            more = min(chunk[3], total)
            chunk[2] += more
            total -= more
        plan.prefill = [(number, first, count) for number, first, count, _ in chunks]

    def passes(self) -> None:
        """The shallow pass of those that can go on, and a deep one where it is due."""
        decoding = [view for view in self.kept if view.length >= view.tokens]
        blocked = [view for view in decoding if view.blocked]
        ready = [view for view in decoding if not view.blocked]
        if self.plan.stalled:
            ready = [view for view in ready if view.id not in self.plan.stalled]
        deep = self._settings.deep
        if blocked and (
            deep.due(len(blocked), len(decoding), max(view.waited for view in blocked))
            or not (ready or self.plan.prefill)
            or self._now - min(view.blocked_since for view in blocked) >= deep.max_seconds
        ):
            joins = [
                view.pending > 0 and view.pending >= deep.join * view.max_pending for view in ready
            ]
            blocked += [view for view, joined in zip(ready, joins, strict=True) if joined]
            ready = [view for view, joined in zip(ready, joins, strict=True) if not joined]
            self.plan.deep = [view.id for view in blocked]
        self.plan.shallow = [view.id for view in ready]

    def _needed(self, view: SequenceView, steps: int = 0) -> int:
        """Blocks that it needs for its next step, prefill to the end, and `steps` after it."""
        growth = view.growth * steps
        if not view.blocked or steps:
            growth += view.growth
        missing = max(view.length, view.tokens) + growth - view.capacity
        return max(0, -(-missing // self._settings.block_tokens))

    def _cost(self, view: RequestView) -> int:
        """Blocks that admitting it takes: all that it needs up to its first token."""
        blocks = -(-(view.tokens + view.growth) // self._settings.block_tokens)
        return blocks - view.shared_blocks

    def _admit(self, own: float, view: RequestView) -> bool:
        """Sets blocks aside for a request, if it fits; may preempt sequences of lower priority.

        A request that is admitted may not be preempted before its first token. So that nobody who
        runs is held up until then, it fits only if all of them can grow meanwhile.
        """
        dropped: list[SequenceView] = []
        if not self._fits(view, dropped):
            lower = [v for v in self.kept if v.progressed and v.priority < view.priority]
            ranked = sorted(((self._rank(self._now, v), v.id, v) for v in lower), reverse=True)
            for theirs, _, victim in ranked:
                if theirs <= own or self._fits(view, dropped):
                    break
                dropped.append(victim)
            if not dropped or not self._fits(view, dropped):
                return False
        for victim in dropped:
            self.plan.preempt.append(victim.id)
            self.kept.remove(victim)
            self.free += self._released(victim)
            if victim.id in self.plan.stalled:
                self.plan.stalled.remove(victim.id)
        if self._bounded:
            self.free -= self._cost(view)
        self._admitted.append(view)
        return True

    def _released(self, victim: SequenceView) -> int:
        """Blocks that preempting it frees, those that were set aside for its next step too."""
        stalled = victim.id in self.plan.stalled
        return victim.own_blocks + (0 if stalled else self._needed(victim))

    def _fits(self, view: RequestView, dropped: Sequence[SequenceView]) -> bool:
        """Whether a request can be admitted once those of `dropped` are preempted."""
        kept = [one for one in self.kept if one not in dropped] if dropped else self.kept
        if len(kept) + len(self._admitted) >= self._settings.max_running:
            return False
        if not self._bounded:
            return True
        outstanding = view.tokens - view.cached
        outstanding += sum(max(0, one.tokens - one.length) for one in kept)
        outstanding += sum(one.tokens - one.cached for one in self._admitted)
        steps = -(-outstanding // self._settings.prefill_tokens)
        growing = sum(self._needed(one, steps) - self._needed(one) for one in kept)
        growing += sum(
            -(-one.growth * steps // self._settings.block_tokens) for one in self._admitted
        )
        free = self.free + sum(map(self._released, dropped))
        return self._cost(view) + growing <= free
