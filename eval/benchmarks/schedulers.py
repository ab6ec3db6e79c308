"""`python -m deliberate.eval.benchmarks.schedulers`: both schedulers on a simulated clock.

The same arrivals of a mixed traffic are served by an assumed machine, whose step takes a base time,
a time for each sequence and one for each token of a prompt. Nothing is measured: the table compares
policies, and the figures of a real server come from `deliberate bench serve`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from deliberate.engine.feedback_scheduler import FeedbackScheduler, FeedbackSettings
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.step_plan import RequestView, SequenceView, Traffic
from deliberate.eval.benchmarks.harness import table_console
from deliberate.policies.remaining_time import PredictedRemaining

# Seconds of a step, of each of its sequences, and of each token of a prompt in it.
STEP, ROW, PROMPT = 0.0004, 0.00005, 0.00002
ROWS = 16
# Name, share of the requests, prompt, longest answer, deadline in seconds, traffic.
CLASSES = (
    ("L1", 0.3, 20, 16, 0.05, Traffic.STANDARD),
    ("L2", 0.2, 60, 80, 0.2, Traffic.STANDARD),
    ("L3", 0.2, 120, 256, 1.0, Traffic.STANDARD),
    ("interactive", 0.2, 60, 128, None, Traffic.INTERACTIVE),
    ("batch", 0.1, 400, 1024, None, Traffic.BATCH),
)


@dataclass
class Job:
    """A request of the simulation and what became of it; seconds, NaN until known."""

    kind: int
    arrival: float
    answer: int
    filled: int = 0
    made: int = 0
    admitted: float = float("nan")
    end: float = float("nan")


def arrivals(load: float, seconds: float, seed: int) -> list[Job]:
    """Poisson arrivals of a mixed traffic at a share of what the machine can do."""
    dice = random.Random(seed)
    token = (STEP + ROWS * ROW) / ROWS
    work = sum(one[1] * (one[3] / 2 * token + one[2] * PROMPT) for one in CLASSES)
    jobs, now = list[Job](), 0.0
    while (now := now + dice.expovariate(load / work)) < seconds:
        kind = dice.choices(range(len(CLASSES)), [one[1] for one in CLASSES])[0]
        jobs.append(Job(kind, now, dice.randint(1, CLASSES[kind][3])))
    return jobs


def simulate(scheduler: Scheduler, jobs: Sequence[Job]) -> float:
    """Runs every job to its end; the second at which the last one ended."""
    now, coming = 0.0, 0
    waiting, running = dict[int, Job](), dict[int, Job]()
    while coming < len(jobs) or waiting or running:
        if not waiting and not running:
            now = max(now, jobs[coming].arrival)
        while coming < len(jobs) and jobs[coming].arrival <= now:
            waiting[coming], coming = jobs[coming], coming + 1
        plan = scheduler.plan(
            now,
            [_waiting(number, one) for number, one in waiting.items()],
            [_running(number, one) for number, one in running.items()],
        )
        for number, _, count in plan.prefill:
            if number in waiting:
                running[number] = waiting.pop(number)
                running[number].admitted = now
            running[number].filled += count
        prefilled = sum(count for _, _, count in plan.prefill)
        now += STEP + ROW * len(plan.shallow) + PROMPT * prefilled
        ended = [n for n, _, _ in plan.prefill if running[n].filled == CLASSES[running[n].kind][2]]
        for number in [*plan.shallow, *ended]:
            one = running[number]
            one.made += 1
            if one.made == one.answer:
                one.end = now
                del running[number]
    return now


def _given(one: Job) -> tuple[float, int, float | None]:
    deadline = CLASSES[one.kind][4]
    return one.arrival, 0, None if deadline is None else one.arrival + deadline


def _waiting(number: int, one: Job) -> RequestView:
    _, _, prompt, limit, _, traffic = CLASSES[one.kind]
    return RequestView(number, prompt, *_given(one), limit=limit, traffic=traffic)


def _running(number: int, one: Job) -> SequenceView:
    _, _, prompt, limit, _, traffic = CLASSES[one.kind]
    length = one.filled + max(0, one.made - 1)
    return SequenceView(
        number, length, prompt, *_given(one), made=one.made, limit=limit, traffic=traffic
    )


def schedulers() -> dict[str, Scheduler]:
    """New ones of each kind, which know nothing yet."""
    limits = SchedulerSettings(max_running=ROWS)

    def feedback(**given: float) -> Scheduler:
        remaining = PredictedRemaining(lambda n: PROMPT * n, lambda n: STEP + ROW * n)
        return FeedbackScheduler(limits, FeedbackSettings(**given), remaining)  # type: ignore[arg-type]

    first = Scheduler(limits, rank_by=lambda now, view: view.arrival)
    return {
        "arrival": first,
        "deadline": Scheduler(limits),
        "feedback": feedback(),
        "feedback, max_wait 0": feedback(max_wait=0.0),
    }


def table(seconds: float, seed: int) -> Table:
    """Every scheduler at 50, 80 and 120 % of capacity, on the same arrivals."""
    made = Table(title=f"{seconds:g} s of arrivals, seed {seed}; simulated, assumed machine")
    for name in ("load", "scheduler", "L1 in time", "L2", "L3", "interactive P50 / P90 ms",
                 "batch P50 / P90 s", "longest wait for a place s", "tokens/s"):  # fmt: skip
        made.add_column(name)
    for load in (0.5, 0.8, 1.2):
        for name, scheduler in schedulers().items():
            jobs = arrivals(load, seconds, seed)
            end = simulate(scheduler, jobs)
            made.add_row(f"{load:.0%}", name, *_figures(jobs, end))
    return made


def _figures(jobs: Sequence[Job], end: float) -> list[str]:
    cells = []
    for kind, (_, _, _, _, deadline, _) in enumerate(CLASSES):
        took = sorted(one.end - one.arrival for one in jobs if one.kind == kind)
        if deadline is not None:
            cells.append(f"{sum(one <= deadline for one in took) / len(took):.1%}")
        else:
            scale = 1 if CLASSES[kind][0] == "batch" else 1000
            p50, p90 = (scale * took[int(share * (len(took) - 1))] for share in (0.5, 0.9))
            cells.append(f"{p50:.3g} / {p90:.3g}")
    wait = max(one.admitted - one.arrival for one in jobs)
    return [*cells, f"{wait:.2f}", f"{sum(one.answer for one in jobs) / end:.0f}"]


def main(arguments: Sequence[str]) -> None:
    """Prints the table; ``seconds=20 seed=1``."""
    given = dict(one.split("=", 1) for one in arguments)
    table_console(160).print(table(float(given.get("seconds", 20)), int(given.get("seed", 1))))


if __name__ == "__main__":
    main(sys.argv[1:])
