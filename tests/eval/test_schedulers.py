"""Schedulers compared on the same simulated arrivals."""

from __future__ import annotations

import math

from deliberate.eval.benchmarks import schedulers


def figures(name: str, load: float):
    jobs = schedulers.arrivals(load, 2.0, seed=1)
    schedulers.simulate(schedulers.schedulers()[name], jobs)
    assert all(math.isfinite(one.end) and one.made == one.answer for one in jobs)
    return jobs


def in_time(jobs, kind: int) -> float:
    deadline = schedulers.CLASSES[kind][4]
    met = [one.end - one.arrival <= deadline for one in jobs if one.kind == kind]
    return sum(met) / len(met)


def test_above_capacity_the_feedback_queue_keeps_tiers_and_interactive_traffic_fast() -> None:
    by_arrival, by_deadline, feedback = (
        figures(name, 1.4) for name in ("arrival", "deadline", "feedback")
    )
    assert in_time(feedback, 0) > 0.95 > in_time(by_arrival, 0)

    def mean(jobs, kind: int) -> float:
        took = [one.end - one.arrival for one in jobs if one.kind == kind]
        return sum(took) / len(took)

    assert mean(feedback, 3) < 0.6 * mean(by_deadline, 3)  # interactive
    assert mean(feedback, 4) < 2 * mean(by_deadline, 4)  # batch is served, too


def test_the_table_has_every_scheduler_at_every_load() -> None:
    assert schedulers.table(0.3, 2).row_count == 3 * len(schedulers.schedulers())
