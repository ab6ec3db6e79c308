"""Processor time of a request by who spends it: client, front, replicas, and the rest of Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

import psutil

ROLES = ("client", "front", "replicas", "ray")
# How Ray calls the processes of replicas.
_REPLICA = "ray::ServeReplica"


def processor_seconds(pid: int) -> dict[str, float]:
    """Seconds of processor time that each role has spent until now.

    Args:
        pid: of the front; the client is this process.
    """
    front = psutil.Process(pid)
    found = dict.fromkeys(ROLES, 0.0)
    found["client"], found["front"] = _spent(psutil.Process()), _spent(front)
    for one in front.children(recursive=True):
        try:
            name = " ".join(one.cmdline())
            role = "replicas" if name.startswith(_REPLICA) else "ray"
            found[role] += _spent(one)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it has ended meanwhile
    return found


def _spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@dataclass
class RequestCosts:
    """What requests cost, summed over loads.

    Attributes:
        requests: that were answered.
        seconds: of processor time by role.
    """

    requests: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))

    def note(self, before: dict[str, float], after: dict[str, float], requests: int) -> None:
        """A load of so many requests."""
        self.requests += requests
        for role in ROLES:
            self.seconds[role] += max(0.0, after[role] - before[role])

    @property
    def each(self) -> dict[str, float]:
        """Seconds of one request by role."""
        return {role: spent / max(1, self.requests) for role, spent in self.seconds.items()}

    def line(self) -> str:
        """In one line."""
        parts = ", ".join(f"{role} {1000 * spent:.2f}" for role, spent in self.each.items())
        return f"{parts} ms of processor time a request"


def highest_rate(each: dict[str, float], replicas: int, cores: float) -> float:
    """Requests a second that no schedule can exceed: each process has one core at most, and all of
    them have the machine's.

    Args:
        each: seconds of one request by role.
        replicas: that share the requests, with one thread each.
        cores: of the machine.
    """
    bounds = [cores / max(1e-9, sum(each.values()))]
    bounds += [1.0 / each[role] for role in ("client", "front") if each[role]]
    if each["replicas"]:
        bounds.append(replicas / each["replicas"])
    return min(bounds)


def highest_efficiency(
    one: dict[str, float], many: dict[str, float], replicas: int, cores: float
) -> float:
    """Throughput of several replicas over that of as many single ones, at best."""
    return highest_rate(many, replicas, cores) / (replicas * highest_rate(one, 1, cores))
