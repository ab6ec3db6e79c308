"""`python -m deliberate.serving.admission_simulation`: admission and scheduling, simulated.

Poisson arrivals with deadlines meet an assumed machine, whose step takes a base time, a time for
each sequence and one for each token of a prompt, with noise and now and then a stall. What is
simulated is the machine alone: `Admission`, `Pace` and the schedulers are the server's own. Nothing
is measured here; the figures of a real server come from ``deliberate bench serve``.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from deliberate.engine.feedback_scheduler import FeedbackScheduler, FeedbackSettings
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.step_plan import RequestView, SequenceView, Traffic
from deliberate.eval.benchmarks.harness import table_console
from deliberate.policies.remaining_time import PredictedRemaining
from deliberate.serving.admission import Admission, Place
from deliberate.serving.errors import ApiError
from deliberate.serving.pace import Pace

# Seconds of a step, of each of its sequences, of each token of a prompt, and outside the engine.
STEP, ROW, PROMPT, OUTSIDE = 0.0004, 0.00022, 0.00005, 0.0012
# Spread of a step's time in the logarithm; one step of so many takes a stall of so many seconds.
NOISE, STALLS, STALL = 0.3, 100, 0.008
ROWS = 16


@dataclass(frozen=True)
class Kind:
    """A kind of request: its share, its longest answer, its deadline in seconds or None, its client
    and the mean length of its answers before they are cut."""

    name: str
    share: float
    limit: int
    deadline: float | None = None
    traffic: Traffic = Traffic.STANDARD
    mean: float = 38.0


# As `deliberate.eval.benchmarks.serve_tiers` and the mix of `deliberate bench serve` have them.
TIERS = (
    Kind("L1", 0.2, 4, 0.05),
    Kind("L2", 0.2, 16, 0.2),
    Kind("L3", 0.2, 64, 1.0),
    Kind("interactive", 0.2, 32, None, Traffic.INTERACTIVE),
    Kind("batch", 0.2, 128, None, Traffic.BATCH),
)
MIX = (Kind("short", 0.9, 64, 0.3), Kind("long", 0.1, 192, 2.0, mean=90.0))


@dataclass
class Job:
    """A request and what became of it.

    Attributes:
        end: second of its last token; NaN where it was not answered.
        refused, given_up: at once; after it had waited.
    """

    kind: Kind
    arrival: float
    prompt: int
    answer: int
    filled: int = 0
    made: int = 0
    place: Place | None = None
    end: float = math.nan
    refused: bool = False
    given_up: bool = False

    @property
    def answered(self) -> bool:
        """With a whole answer."""
        return not math.isnan(self.end)

    @property
    def in_time(self) -> bool:
        """Answered within its deadline."""
        due = math.inf if self.kind.deadline is None else self.arrival + self.kind.deadline
        return self.answered and self.end <= due

    def given(self) -> tuple[float, int, float | None]:
        """Arrival, priority and deadline, as views have them."""
        due = None if self.kind.deadline is None else self.arrival + self.kind.deadline
        return self.arrival, 0, due


def arrivals(
    kinds: Sequence[Kind], rate: Callable[[float], float], seconds: float, seed: int
) -> list[Job]:
    """Poisson arrivals, `rate` of them a second."""
    dice, now, made = random.Random(seed), 0.0, list[Job]()
    while (now := now + dice.expovariate(rate(now))) < seconds:
        kind = dice.choices(kinds, [one.share for one in kinds])[0]
        prompt = round(dice.gauss(50, 6)) if dice.random() < 0.9 else 230
        answer = min(kind.limit, max(1, round(dice.gauss(kind.mean, kind.mean / 3))))
        made.append(Job(kind, now, max(1, prompt), answer))
    return made


class Machine:
    """Serves jobs; its clock is the only one.

    Args:
        scheduler: "deadline" or "feedback".
        jobs: by arrival.
        admit: whether deadlines are checked when a job comes, and given up when it has waited.
        seed: of the noise.
        feedback: of the scheduler of that name.
    """

    def __init__(
        self,
        scheduler: str,
        jobs: Sequence[Job],
        *,
        admit: bool = True,
        seed: int = 0,
        feedback: FeedbackSettings | None = None,
    ) -> None:
        self.now = 0.0
        self._pace = Pace()
        limits = SchedulerSettings(max_running=ROWS)
        self._scheduler = Scheduler(limits)
        if scheduler == "feedback":
            remaining = PredictedRemaining(self._pace.prompt_seconds, self._pace.token_seconds)
            settings = feedback or FeedbackSettings()
            self._scheduler = FeedbackScheduler(limits, settings, remaining)
        self._admission = Admission(lambda: self._pace, ROWS, clock=lambda: self._clock)
        self._admit, self._dice = admit, random.Random(seed)
        self._coming = list(reversed(jobs))
        self._waiting: dict[int, Job] = {}
        self._running: dict[int, Job] = {}
        self._next = 0
        self._clock = 0.0

    def run(self) -> None:
        """Serves all of them."""
        while self._coming or self._waiting or self._running:
            if not (self._waiting or self._running):
                self.now = max(self.now, self._coming[-1].arrival)
            self._take()
            if self._waiting or self._running:
                self._step()

    def _take(self) -> None:
        while self._coming and self._coming[-1].arrival <= self.now:
            job = self._coming.pop()
            # It was checked when it came, by what was known before this step.
            self._clock = job.arrival + OUTSIDE / 2
            deadline = None if job.kind.deadline is None else 1000 * job.kind.deadline
            if self._admit:
                try:
                    job.place = self._admission.enter(
                        job.prompt, job.kind.limit, 1, deadline, job.arrival
                    )
                except ApiError:
                    job.refused = True
                    continue
            self._waiting[self._next] = job
            self._next += 1
        for number, job in [*self._waiting.items(), *self._running.items()]:
            if job.place is not None and job.made == 0 and self.now > job.place.begin_by:
                (self._waiting if number in self._waiting else self._running).pop(number)
                job.given_up = True
                job.place.end()

    def _step(self) -> None:
        plan = self._scheduler.plan(
            self.now,
            [_waiting(*one) for one in self._waiting.items()],
            [_running(*one) for one in self._running.items()],
        )
        for number, _, count in plan.prefill:
            if number in self._waiting:
                self._running[number] = self._waiting.pop(number)
            self._running[number].filled += count
        prefilled = sum(count for _, _, count in plan.prefill)
        took = STEP + ROW * len(plan.shallow) + PROMPT * prefilled
        took *= self._dice.lognormvariate(0.0, NOISE)
        took += STALL * (self._dice.randrange(STALLS) == 0)
        self.now += took
        begun = [
            n for n, _, _ in plan.prefill if self._running[n].filled == self._running[n].prompt
        ]
        decoded, tokens = len(plan.shallow), [*plan.shallow, *begun]
        for number in tokens:
            job = self._running[number]
            job.made += 1
            if job.made == job.answer:
                self._end(number, job)
        self._pace.note_step(decoded, len(tokens), prefilled, took)

    def _end(self, number: int, job: Job) -> None:
        del self._running[number]
        self._clock = job.end = self.now + OUTSIDE
        if job.place is not None:
            job.place.end(finished=True)
            job.place.sent()
            took = job.end - job.arrival
            self._admission.note_answer(job.made, took, OUTSIDE, job.kind.limit)


def _waiting(number: int, job: Job) -> RequestView:
    limit, traffic = job.kind.limit, job.kind.traffic
    return RequestView(number, job.prompt, *job.given(), limit=limit, traffic=traffic)


def _running(number: int, job: Job) -> SequenceView:
    limit, traffic = job.kind.limit, job.kind.traffic
    length = job.filled + max(0, job.made - 1)
    return SequenceView(
        number, length, job.prompt, *job.given(), made=job.made, limit=limit, traffic=traffic
    )


def through(jobs: Sequence[Job], first: float, last: float) -> tuple[float, float]:
    """Answers, and answers in time, a second between two seconds."""
    ended = [one for one in jobs if one.answered and first <= one.end < last]
    return len(ended) / (last - first), sum(one.in_time for one in ended) / (last - first)


def table(seconds: float, seed: int) -> Table:
    """Tiers at three rates, short and long requests at 120 % of what can be answered and in a
    burst, with and without admission; rates of answers are those of the middle third."""
    made = Table(title=f"{seconds:g} s of arrivals, seed {seed}; simulated, assumed machine")
    for name in ("load", "served", "kind", "requests", "refused", "given up", "in time of answered",
                 "P50 / P90 ms"):  # fmt: skip
        made.add_column(name)
    loads: list[tuple[str, str, Sequence[Kind], Callable[[float], float]]] = [
        (f"tiers, {rate} a second", "feedback", TIERS, lambda _, rate=rate: rate)  # type: ignore[misc]
        for rate in (70, 90, 140)
    ]
    middle = seconds / 3
    loads.append(("short and long, 85 a second", "deadline", MIX, lambda _: 85.0))
    loads.append(
        ("burst", "deadline", MIX, lambda now: 150.0 if middle <= now < 2 * middle else 30.0)
    )
    for name, scheduler, kinds, rate in loads:
        for admit in (False, True):
            jobs = arrivals(kinds, rate, seconds, seed)
            Machine(scheduler, jobs, admit=admit, seed=seed).run()
            served = f"{scheduler}, {'admission' if admit else 'everybody'}"
            if kinds is MIX:
                served += "; {:.1f} answers, {:.1f} in time a second in the middle".format(
                    *through(jobs, middle, 2 * middle)
                )
            for kind in kinds:
                made.add_row(
                    name, served, kind.name, *_figures([j for j in jobs if j.kind is kind])
                )
                name = served = ""
    return made


def _figures(jobs: Sequence[Job]) -> list[str]:
    took = sorted(one.end - one.arrival for one in jobs if one.answered)
    if not took:
        return [str(len(jobs)), str(len(jobs)), "0", "", ""]
    share = sum(one.in_time for one in jobs) / len(took)
    p50, p90 = (1000 * took[int(part * (len(took) - 1))] for part in (0.5, 0.9))
    counts = [len(jobs), sum(one.refused for one in jobs), sum(one.given_up for one in jobs)]
    return [*map(str, counts), f"{share:.1%}", f"{p50:.0f} / {p90:.0f}"]


def main(arguments: Sequence[str]) -> None:
    """Prints the table; ``seconds=24 seed=1``."""
    given = dict(one.split("=", 1) for one in arguments)
    table_console(180).print(table(float(given.get("seconds", 24)), int(given.get("seed", 1))))


if __name__ == "__main__":
    main(sys.argv[1:])
