"""What the scheduler is told of requests and sequences, and what it decides for a step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from deliberate.utils.errors import DeliberateError


class Traffic(StrEnum):
    """What a request's client is like: somebody waits for each token, or nobody waits."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


@dataclass(frozen=True)
class RequestView:
    """A request that waits to be admitted, or to be admitted again after it was preempted.

    Attributes:
        id: of the request; no two of a plan are equal.
        tokens: ids that must be in the cache before it decodes: its prompt, and after a preemption
            what it had generated too; at least 1.
        arrival: when it came, in seconds of the clock that ``plan`` is given; a preempted request
            keeps the time at which it first came.
        priority: a higher number is more urgent.
        deadline: second of that clock by which it should be finished; None for none.
        seconds_left: prediction of how long it still runs; 0 where there is none.
        cached: of `tokens`, how many from the first on are in shared blocks and need no prefill;
            fewer than `tokens`, since the last one has to be run for its logits.
        shared_blocks: blocks of these that a running sequence holds too, so that they take nothing
            from the free blocks.
        growth: see `SequenceView`.
        made, limit, traffic: see `SequenceView`.
        keys: of each full block of `tokens` after `cached`, in order, what identifies it for
            sharing. The first is the block that this request would like to find in the cache; while
            another one's prefill is about to publish it, this one waits. Empty: nothing is shared.
    """

    id: int
    tokens: int
    arrival: float
    priority: int = 0
    deadline: float | None = None
    seconds_left: float = 0.0
    cached: int = 0
    shared_blocks: int = 0
    growth: int = 1
    keys: Sequence[Hashable] = ()
    made: int = 0
    limit: int = 0
    traffic: Traffic = Traffic.STANDARD

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise DeliberateError(f"request {self.id} has {self.tokens} tokens: at least 1 is run")
        if not 0 <= self.cached < self.tokens:
            raise DeliberateError(
                f"request {self.id}: {self.cached} of {self.tokens} tokens cached; from 0 to "
                f"{self.tokens - 1}, the last one is always run"
            )
        if self.growth < 1:
            raise DeliberateError(f"request {self.id}: growth {self.growth} must be at least 1")


class SequenceView(NamedTuple):
    """An admitted sequence: it has a cache row and is prefilled or decodes.

    A tuple, since one is made per sequence and step: that takes a seventh of a dataclass's time.

    Attributes:
        id: of the request.
        length: its tokens in the first layers' KV.
        tokens: those that must be there before it decodes, `RequestView.tokens`: it is being
            prefilled while ``length < tokens``.
        arrival, priority, deadline, seconds_left: as in `RequestView`.
        capacity: tokens that its blocks can hold. A shared block that would be copied when it is
            written to counts as full.
        own_blocks: blocks that become free when it is preempted, those that only it holds.
        growth: most tokens by which `length` grows in a step: 1, and more where drafts or several
            tokens are run in one call.
        blocked: its newest token did not exit; only a deep pass can carry it on.
        waited: plans since it was blocked that did not serve it.
        blocked_since: second at which it was blocked; not read where it is not.
        pending: tokens pending above the first exit that it runs; 0 where it must not join the deep
            pass of others, because its output would depend on them.
        max_pending: most tokens that may be.
        progressed: it has gained a token since it was last admitted. Only then may it be preempted.
        keys: of the full blocks that its prefill is still to publish, see `RequestView`.
        made: tokens that it has generated.
        limit: most tokens that it may generate.
        traffic: what its client is like.
    """

    id: int
    length: int
    tokens: int
    arrival: float
    priority: int = 0
    deadline: float | None = None
    seconds_left: float = 0.0
    capacity: int = 0
    own_blocks: int = 0
    growth: int = 1
    blocked: bool = False
    waited: int = 0
    blocked_since: float = 0.0
    pending: int = 0
    max_pending: int = 1
    progressed: bool = True
    keys: Sequence[Hashable] = ()
    made: int = 0
    limit: int = 0
    traffic: Traffic = Traffic.STANDARD


@dataclass
class StepPlan:
    """What one step does: preempt first, then admit and prefill, then the two passes.

    Attributes:
        prefill: (id, first token, number of tokens) of each chunk. A waiting request that is named
            here is admitted by it. The chunk that ends a prompt gives its first token.
        shallow: sequences whose newest token is run from the first layer on: to an exit, or to the
            last layer where a sequence has none.
        deep: sequences whose pending tokens are run through the layers above.
        preempt: sequences whose row is closed; they are waiting again.
        stalled: sequences that could go on but for a free block; they keep theirs.
    """

    prefill: list[tuple[int, int, int]] = field(default_factory=list)
    shallow: list[int] = field(default_factory=list)
    deep: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    stalled: list[int] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Nothing would be run."""
        return not (self.prefill or self.shallow or self.deep)
