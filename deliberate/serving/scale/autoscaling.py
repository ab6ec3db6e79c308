"""How many replicas the load needs: the fewest with which nobody is predicted to wait too long.

The time that a request waits for a place is that of a queue with Poisson arrivals, exponential
service and as many servers as all replicas have places (Erlang's C formula; Gross et al.,
Fundamentals of Queueing Theory, chapter 2), and what it takes to work off those that wait already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deliberate.utils.errors import DeliberateError


@dataclass(frozen=True)
class FleetLoad:
    """What all replicas together are asked for.

    Attributes:
        arrivals: requests a second.
        service_seconds: of a request, from its place to its end, at full load.
        slots: places of one replica.
        queued: requests that wait now.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    arrivals: float
    service_seconds: float
    slots: int
    queued: float = 0.0

    def __post_init__(self) -> None:
        for name in ("arrivals", "service_seconds", "queued"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DeliberateError(f"{name} {getattr(self, name)} must be 0 or more")
        if self.slots < 1:
            raise DeliberateError(f"slots {self.slots} must be at least 1")


def waiting_probability(places: int, work: float) -> float:
    """Erlang's C: the share of requests that find every place taken.

    Args:
        places: in all.
        work: arrivals times service time, in places.
    """
    if work >= places:
        return 1.0
    blocked = 1.0  # Erlang's B by its recursion, which neither overflows nor loses digits
    for count in range(1, places + 1):
        blocked = work * blocked / (count + work * blocked)
    return blocked / (1.0 - work / places * (1.0 - blocked))


def predicted_wait(load: FleetLoad, replicas: int) -> float:
    """Seconds until a request that comes now has a place; infinite where the queue only grows."""
    places = replicas * load.slots
    work = load.arrivals * load.service_seconds
    if places < 1 or work >= places:
        return math.inf if work > 0 or load.queued > 0 else 0.0
    if load.service_seconds == 0:
        return 0.0
    spare = places / load.service_seconds - load.arrivals
    return waiting_probability(places, work) / spare + load.queued / spare


def wanted_replicas(load: FleetLoad, *, target: float, least: int = 1, most: int = 1) -> int:
    """The fewest replicas whose predicted wait is at most `target` seconds, from `least` to `most`.

    Raises:
        DeliberateError: a target that is not above 0, or bounds that do not fit.
    """
    if not target > 0:
        raise DeliberateError(f"target wait {target} must be more than 0 s")
    if not 0 <= least <= most or most < 1:
        raise DeliberateError(f"replicas from {least} to {most}: 0 <= least <= most, most >= 1")
    for count in range(least, most):
        if predicted_wait(load, count) <= target:
            return count
    return most


class PredictedWaitPolicy:
    """Ray Serve's autoscaling by `wanted_replicas`.

    Replicas report `arrivals_per_second`, `service_seconds` and `slots`
    (``record_autoscaling_stats``); Ray adds those that wait in front, keeps the bounds, and waits
    with a change as the deployment's delays say.

    Args:
        target_wait: seconds.
    """

    def __init__(self, target_wait: float = 1.0) -> None:
        if not target_wait > 0:
            raise DeliberateError(f"target_wait {target_wait} must be more than 0 s")
        self._target = target_wait

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas for one `ray.serve.config.AutoscalingContext`."""
        bounds = {
            "least": context.capacity_adjusted_min_replicas,
            "most": max(1, context.capacity_adjusted_max_replicas),
        }
        reported = context.aggregated_metrics or {}
        load = fleet_load(
            {name: list(one.values()) for name, one in reported.items()},
            context.total_queued_requests or 0.0,
        )
        if load is None:  # nothing has been decoded yet
            return context.target_num_replicas, {}
        return wanted_replicas(load, target=self._target, **bounds), {}


def fleet_load(reported: dict[str, list[float]], queued: float) -> FleetLoad | None:
    """The load from what replicas reported, by name; None before the first answer."""
    seconds = [one for one in reported.get("service_seconds", ()) if one > 0]
    slots = reported.get("slots", ())
    if not seconds or not slots:
        return None
    return FleetLoad(
        arrivals=sum(reported.get("arrivals_per_second", ())),
        service_seconds=sum(seconds) / len(seconds),
        slots=max(1, round(sum(slots) / len(slots))),
        queued=queued,
    )
