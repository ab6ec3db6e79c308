"""Replicas on a simulated clock: what routing, killing and adding replicas do to waiting times.

A replica decodes up to `slots` requests together; the time of a token depends on how many there
are, and the prompt of a request that begins holds the others up, as in an engine that runs prompts
between steps. Requests are fluid: a token is not a step of its own, so that thousands of replicas
are simulated in seconds. Nothing is measured here; the times are those that the machines are given.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from deliberate.serving.scale.prefix_affinity import PrefixDirectory
from deliberate.serving.scale.replica_score import ReplicaState, RequestSize, ScoreWeights, ranked


@dataclass(frozen=True)
class Machine:
    """What one replica runs on.

    Attributes:
        slots: requests that it decodes at a time.
        token_seconds: between two tokens of a request while so many are decoded.
        prompt_seconds: of so many tokens of a prompt, run alone.
        shares_prefixes: a beginning that it has run costs it nothing again.
    """

    slots: int
    token_seconds: Callable[[int], float]
    prompt_seconds: Callable[[int], float]
    shares_prefixes: bool = False


@dataclass
class Job:
    """One request and what became of it.

    Attributes:
        arrival: second.
        prompt, answer: tokens.
        keys: of its prompt's beginning (`prefix_affinity.prefix_keys`).
        first, end: second of its first and of its last token; None while not reached.
        tries: replicas that it was sent to.
        served: name of the last one.
        refused: no replica took it, or the last one that was tried ended before it.
    """

    arrival: float
    prompt: int
    answer: int
    keys: tuple[bytes, ...] = ()
    first: float | None = None
    end: float | None = None
    tries: int = 0
    served: str | None = None
    refused: bool = False


class FleetReplica:
    """One replica: what runs and what waits there at the second `now`."""

    def __init__(self, name: str, machine: Machine, now: float = 0.0) -> None:
        self.name = name
        self.machine = machine
        self.version = 0  # of its next event; older ones in the queue are stale
        self._now = now
        self._stall = 0.0
        self._running: list[list[float]] = []
        self._jobs: list[Job] = []
        self._waiting: deque[tuple[Job, float]] = deque()
        self._answer_seconds = 0.0

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._jobs) + len(self._waiting)

    def state(self) -> ReplicaState:
        """What it would report now."""
        return ReplicaState(
            self.name,
            token_seconds=self.machine.token_seconds(1),
            full_token_seconds=self.machine.token_seconds(self.machine.slots),
            prompt_seconds=self.machine.prompt_seconds(100) / 100,
            answer_seconds=self._answer_seconds,
            free_memory=1.0 - len(self._jobs) / self.machine.slots,
            slots=self.machine.slots,
            unfinished=self.unfinished,
            shares_prefixes=self.machine.shares_prefixes,
        )

    def add(self, job: Job, now: float, matched: float) -> None:
        """A request is sent there; `matched` of its prompt's beginning is known there."""
        self._advance(now)
        job.tries, job.served = job.tries + 1, self.name
        self._waiting.append((job, matched if self.machine.shares_prefixes else 0.0))
        self._fill()

    def next_end(self) -> float:
        """Second at which the next request ends; infinite without any."""
        if not self._jobs:
            return math.inf
        left = min(one[0] for one in self._running)
        return self._now + self._stall + left * self.machine.token_seconds(len(self._jobs))

    def end_due(self, now: float) -> None:
        """Ends what has ended by then, and begins what has waited."""
        self._advance(now)
        kept = []
        for job, left in zip(self._jobs, self._running, strict=True):
            if left[0] > 1e-9:
                kept.append((job, left))
                continue
            job.end = now
            took = now - job.arrival
            mean = self._answer_seconds
            self._answer_seconds = took if mean == 0 else mean + 0.1 * (took - mean)
        self._jobs, self._running = [one for one, _ in kept], [left for _, left in kept]
        self._fill()

    def kill(self) -> list[Job]:
        """It has gone; returns what did not end."""
        lost = [*self._jobs, *(job for job, _ in self._waiting)]
        self._jobs, self._running, self._waiting = [], [], deque()
        self.version += 1
        return lost

    def _advance(self, now: float) -> None:
        passed = now - self._now
        self._now = now
        stalled = min(passed, self._stall)
        self._stall -= stalled
        if self._jobs and passed > stalled:
            tokens = (passed - stalled) / self.machine.token_seconds(len(self._jobs))
            for one in self._running:
                one[0] -= tokens

    def _fill(self) -> None:
        while self._waiting and len(self._jobs) < self.machine.slots:
            job, matched = self._waiting.popleft()
            self._stall += self.machine.prompt_seconds(round(job.prompt * (1.0 - matched)))
            self._jobs.append(job)
            self._running.append([float(job.answer)])
            if job.first is None:
                job.first = self._now + self._stall
        self.version += 1


# From the replicas' states, the request's size and the matched shares to names, the best first.
Router = Callable[[Sequence[ReplicaState], RequestSize, dict[str, float]], list[str]]


def by_score(weights: ScoreWeights | None = None) -> Router:
    """`replica_score.ranked`."""
    return lambda states, size, matched: ranked(states, size, matched, weights)


def in_turn() -> Router:
    """One after the other, whatever their load."""
    turns = itertools.count()

    def choose(
        states: Sequence[ReplicaState], _: RequestSize, matched: dict[str, float]
    ) -> list[str]:
        names = [one.name for one in states]
        start = next(turns) % len(names)
        return names[start:] + names[:start]

    return choose


def fewest_requests() -> Router:
    """The fewest unfinished requests first, as Ray's own router among those that it looks at."""

    def choose(
        states: Sequence[ReplicaState], _: RequestSize, matched: dict[str, float]
    ) -> list[str]:
        return [one.name for one in sorted(states, key=lambda one: (one.unfinished, one.name))]

    return choose


@dataclass(frozen=True)
class Outage:
    """A replica is killed, and another takes its place later.

    Attributes:
        at: second.
        name: of the replica.
        seconds: until one with an empty cache takes requests in its place.
    """

    at: float
    name: str
    seconds: float


@dataclass
class Fleet:
    """Replicas behind one router.

    Attributes:
        machines: by name of the replica.
        router: see `Router`.
        ongoing: requests that a replica is sent at a time; further ones wait in front.
        queued: requests that wait in front at most; a further one is refused.
        tries: replicas that a request is sent to at most, where one is killed under it.
        look_at: replicas that the router looks at for one request, in turn; all where None. In a
            large fleet looking at all of them for each request is what costs.
    """

    machines: dict[str, Machine]
    router: Router
    ongoing: int = 1 << 30
    queued: int = 1 << 30
    tries: int = 2
    look_at: int | None = None
    _replicas: dict[str, FleetReplica] = field(default_factory=dict)
    _front: deque[Job] = field(default_factory=deque)
    _events: list[tuple[float, int, str, object, int]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _prefixes: PrefixDirectory = field(default_factory=PrefixDirectory)
    _next: int = 0

    def run(self, jobs: Sequence[Job], outages: Iterable[Outage] = ()) -> float:
        """Serves all requests; returns the second of the last event."""
        self._replicas = {
            name: FleetReplica(name, machine) for name, machine in self.machines.items()
        }
        for job in jobs:
            self._push(job.arrival, "arrival", job)
        for outage in outages:
            self._push(outage.at, "kill", outage)
        now = 0.0
        while self._events:
            now, _, kind, what, version = heapq.heappop(self._events)
            if kind == "end":
                replica = self._replicas.get(str(what))
                if replica is None or replica.version != version:
                    continue
                replica.end_due(now)
                self._schedule(replica)
                self._drain(now)
            elif kind == "arrival":
                assert isinstance(what, Job)
                self._send(what, now)
            elif kind == "kill":
                assert isinstance(what, Outage)
                self._kill(what, now)
            else:
                assert isinstance(what, Outage)
                machine = self.machines[what.name]
                self._replicas[what.name] = FleetReplica(what.name, machine, now)
                self._drain(now)
        for job in self._front:
            job.refused = True
        return now

    def _push(self, at: float, kind: str, what: object, version: int = 0) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), kind, what, version))

    def _schedule(self, replica: FleetReplica) -> None:
        end = replica.next_end()
        if end < math.inf:
            self._push(end, "end", replica.name, replica.version)

    def _send(self, job: Job, now: float) -> None:
        if self._front or not self._place(job, now):
            if len(self._front) >= self.queued:
                job.refused = True
            else:
                self._front.append(job)

    def _drain(self, now: float) -> None:
        while self._front and self._place(self._front[0], now):
            self._front.popleft()

    def _place(self, job: Job, now: float) -> bool:
        """Sends a request to the best replica that has a place for it; whether there was one."""
        states = [one.state() for one in self._looked_at() if one.unfinished < self.ongoing]
        if not states:
            return False
        matched = self._prefixes.matched(job.keys, [one.name for one in states])
        size = RequestSize(job.prompt, job.answer)
        replica = self._replicas[self.router(states, size, matched)[0]]
        replica.add(job, now, matched.get(replica.name, 0.0))
        self._prefixes.note(job.keys, replica.name)
        self._schedule(replica)
        return True

    def _looked_at(self) -> list[FleetReplica]:
        every = list(self._replicas.values())
        if self.look_at is None or self.look_at >= len(every):
            return every
        start, self._next = self._next, self._next + self.look_at
        return [every[(start + k) % len(every)] for k in range(self.look_at)]

    def _kill(self, outage: Outage, now: float) -> None:
        replica = self._replicas.pop(outage.name, None)
        if replica is None:
            return
        self._prefixes.forget(outage.name)
        self._push(now + outage.seconds, "join", outage)
        for job in replica.kill():
            if job.tries >= self.tries:
                job.refused = True
            else:
                self._send(job, now)
