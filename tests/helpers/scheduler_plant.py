"""A machine that carries out step plans on a simulated clock and counts its blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from deliberate.engine.scheduler import Scheduler
from deliberate.engine.step_plan import RequestView, SequenceView, StepPlan, Traffic


@dataclass(frozen=True)
class Job:
    """A request: how long its prompt and its answer are, and how often its tokens exit early."""

    arrival: float
    prompt: int
    answer: int
    priority: int = 0
    deadline: float | None = None
    growth: int = 1
    exit_rate: float | None = None  # None: dense
    max_pending: int = 4
    traffic: Traffic = Traffic.STANDARD


@dataclass
class Live:
    """An admitted job."""

    length: int
    tokens: int
    blocks: int = 0
    blocked: bool = False
    waited: int = 0
    blocked_since: float = 0.0
    pending: int = 0
    progressed: bool = False


@dataclass
class Plant:
    """Runs jobs to their end; every plan is checked against what the machine can do.

    Attributes:
        finished, first_token: second of each job's end and first token.
        admitted_at: second of its first admission.
        admitted: ids in the order of their first admission.
        preempted: how often each job was.
    """

    scheduler: Scheduler
    jobs: list[Job]
    total_blocks: int
    seed: int = 0
    now: float = 0.0
    made: dict[int, int] = field(default_factory=dict)
    live: dict[int, Live] = field(default_factory=dict)
    finished: dict[int, float] = field(default_factory=dict)
    first_token: dict[int, float] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    admitted_at: dict[int, float] = field(default_factory=dict)
    preempted: dict[int, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=lambda: {"shallow": 0, "deep": 0})

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.size = self.scheduler.settings.block_tokens

    @property
    def free(self) -> int:
        return self.total_blocks - sum(one.blocks for one in self.live.values())

    def waiting(self) -> list[RequestView]:
        return [
            RequestView(
                number,
                job.prompt + self.made.get(number, 0),
                job.arrival,
                job.priority,
                job.deadline,
                growth=job.growth,
                made=self.made.get(number, 0),
                limit=job.answer,
                traffic=job.traffic,
            )
            for number, job in enumerate(self.jobs)
            if job.arrival <= self.now and number not in self.live and number not in self.finished
        ]

    def running(self) -> list[SequenceView]:
        made = []
        for number, one in self.live.items():
            job = self.jobs[number]
            made.append(
                SequenceView(
                    number,
                    one.length,
                    one.tokens,
                    job.arrival,
                    job.priority,
                    job.deadline,
                    0.0,
                    one.blocks * self.size,
                    one.blocks,
                    job.growth,
                    one.blocked,
                    one.waited,
                    one.blocked_since,
                    one.pending,
                    job.max_pending,
                    one.progressed,
                    made=self.made.get(number, 0),
                    limit=job.answer,
                    traffic=job.traffic,
                )
            )
        return made

    def run(self, most_steps: int = 100_000) -> None:
        for _ in range(most_steps):
            if len(self.finished) == len(self.jobs):
                assert self.free == self.total_blocks
                return
            if not self.step():
                self.now = min(job.arrival for job in self.jobs if job.arrival > self.now)
        raise AssertionError(f"{len(self.jobs) - len(self.finished)} jobs are not finished")

    def step(self) -> StepPlan | None:
        """One step; None where there is nothing to do yet."""
        waiting, running = self.waiting(), self.running()
        if not waiting and not running:
            return None
        plan = self.scheduler.plan(self.now, waiting, running, self.free)
        self.check(plan, waiting, running)
        for number in plan.preempt:
            assert self.live.pop(number).progressed, "preempted again before it gained a token"
            self.preempted[number] = self.preempted.get(number, 0) + 1
        before = dict(self.made)
        served = {number for number, _, _ in plan.prefill} | {*plan.shallow, *plan.deep}
        for number, first, count in plan.prefill:
            self._prefill(number, first, count)
        self._shallow(plan.shallow)
        self._deep(plan.deep)
        self.now += 0.001 * (1 + len(served)) + 0.0001 * sum(c for _, _, c in plan.prefill)
        for number, one in list(self.live.items()):
            one.progressed |= self.made.get(number, 0) > before.get(number, 0)
            if one.blocked and number not in served:
                one.waited += 1
                assert one.waited <= self.scheduler.settings.deep.max_wait, "waited too long"
            if self.made.get(number, 0) >= self.jobs[number].answer:
                self.finished[number] = self.now
                del self.live[number]
        return plan

    def check(
        self, plan: StepPlan, waiting: list[RequestView], running: list[SequenceView]
    ) -> None:
        settings = self.scheduler.settings
        ids = [number for number, _, _ in plan.prefill] + plan.shallow + plan.deep + plan.preempt
        assert len(ids) == len(set(ids)), f"one is named twice: {plan}"
        decoding = {*plan.shallow, *plan.deep, *plan.stalled} & {
            view.id for view in running if view.length >= view.tokens
        }
        limit = settings.prefill_tokens if decoding else settings.idle_prefill_tokens
        assert sum(count for _, _, count in plan.prefill) <= limit
        assert all(count > 0 for _, _, count in plan.prefill)
        views = [*running, *waiting]
        first = min(views, key=lambda view: (self.scheduler._rank(self.now, view), view.id)).id
        assert first not in plan.stalled and first not in plan.preempt

    def _grow(self, number: int, tokens: int) -> None:
        one = self.live[number]
        one.length += tokens
        one.blocks = max(one.blocks, -(-one.length // self.size))
        assert self.free >= 0, "blocks are overcommitted"

    def _gain(self, number: int, tokens: int = 1) -> None:
        self.made[number] = self.made.get(number, 0) + tokens
        self.first_token.setdefault(number, self.now)

    def _prefill(self, number: int, first: int, count: int) -> None:
        if number not in self.live:
            self.live[number] = Live(0, self.jobs[number].prompt + self.made.get(number, 0))
            if number not in self.admitted:
                self.admitted.append(number)
                self.admitted_at[number] = self.now
            assert len(self.live) <= self.scheduler.settings.max_running
        one = self.live[number]
        assert first == one.length and first + count <= one.tokens
        self._grow(number, count)
        if one.length == one.tokens:
            self._gain(number)

    def _shallow(self, numbers: list[int]) -> None:
        self.passes["shallow"] += bool(numbers)
        for number in numbers:
            job, one = self.jobs[number], self.live[number]
            assert one.length >= one.tokens and not one.blocked
            tokens = self.random.randint(1, job.growth)
            self._grow(number, tokens)
            if job.exit_rate is None:
                self._gain(number, tokens)
                continue
            one.pending += tokens
            if one.pending < job.max_pending and self.random.random() < job.exit_rate:
                self._gain(number, tokens)
            else:
                if tokens > 1:
                    self._gain(number, tokens - 1)
                one.blocked, one.waited, one.blocked_since = True, 0, self.now

    def _deep(self, numbers: list[int]) -> None:
        self.passes["deep"] += bool(numbers)
        for number in numbers:
            one = self.live[number]
            assert one.blocked or one.pending
            one.pending = 0
            if one.blocked:
                self._gain(number)
            one.blocked = False
