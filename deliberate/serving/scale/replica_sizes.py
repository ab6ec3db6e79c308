"""How many requests one replica takes at a time, from the cost model of its machine.

A replica that holds too few idles between answers; one that holds too many keeps requests waiting
that another replica could decode. It is sent as many as it decodes at a time, and as many more as
it works off within a stated wait; the rest waits in front, for whichever replica is free first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deliberate.cost.model import CostModel
from deliberate.utils.errors import DeliberateError

# Share of the best throughput that is enough: beyond, a larger batch only makes tokens slower.
_ENOUGH = 0.98


@dataclass(frozen=True)
class ReplicaSizes:
    """Limits of one replica, and of what waits for all of them.

    Attributes:
        running: requests that it decodes at a time.
        ongoing: requests that it is sent at a time (Ray's ``max_ongoing_requests``).
        queued: requests that may wait in front (Ray's ``max_queued_requests``).
        retry_after: seconds that a refused client is told to wait.
        answer_seconds: of one answer at full load; 0 where no cost model is known.
    """

    running: int
    ongoing: int
    queued: int
    retry_after: int = 1
    answer_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.running <= self.ongoing or self.queued < 0 or self.retry_after < 1:
            raise DeliberateError(
                f"sizes {self}: 1 <= running <= ongoing, queued >= 0 and retry_after >= 1"
            )


def step_seconds(cost: CostModel, running: int) -> float:
    """One token of each of so many sequences, through every layer."""
    layers = sum(cost.segment_seconds(k, batch=running) for k in range(len(cost.segments)))
    return cost.step + layers + cost.head.seconds(running, 1, 0)


def answer_seconds(cost: CostModel, running: int, prompt: int, answer: int) -> float:
    """One request while so many are decoded, without waiting; the prompts of others included.

    While an answer is decoded, each of the other places begins about one prompt, too.
    """
    return running * cost.prompt_seconds(prompt) + answer * step_seconds(cost, running)


def replica_sizes(
    cost: CostModel | None,
    *,
    max_running: int,
    max_waiting: int,
    replicas: int,
    prompt: int = 128,
    answer: int = 64,
    wait: float = 1.0,
) -> ReplicaSizes:
    """Sizes for a machine with this cost model; None: for one of which nothing is known.

    Args:
        max_running: most requests that are decoded at a time.
        max_waiting: for each replica, most requests that wait, there and in front.
        prompt, answer: tokens of a typical request.
        wait: seconds that a request may wait in a replica.

    Raises:
        DeliberateError: a number below 1.
    """
    for name, value in (("max_running", max_running), ("replicas", replicas), ("answer", answer)):
        if value < 1:
            raise DeliberateError(f"{name} {value} must be at least 1")
    if cost is None:
        inside = min(max_running, max_waiting)
        return ReplicaSizes(max_running, max_running + inside, replicas * (max_waiting - inside))
    rates = [b / answer_seconds(cost, b, prompt, answer) for b in range(1, max_running + 1)]
    enough = _ENOUGH * max(rates)
    running = next(count for count, rate in enumerate(rates, 1) if rate >= enough)
    inside = min(max_waiting, math.floor(wait * rates[running - 1]))
    queued = replicas * (max_waiting - inside)
    whole = running / rates[running - 1]
    return ReplicaSizes(
        running,
        running + inside,
        queued,
        max(1, math.ceil(whole / running)),
        whole,
    )
