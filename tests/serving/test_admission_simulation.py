"""Admission and pre-emption keep deadlines on a simulated machine, at what it can answer."""

from __future__ import annotations

import math

from deliberate.engine.feedback_scheduler import FeedbackSettings
from deliberate.serving.admission_simulation import (
    MIX,
    TIERS,
    Job,
    Machine,
    arrivals,
    table,
    through,
)


def served(scheduler, kinds, rate, seconds, **given) -> list[Job]:
    jobs = arrivals(kinds, rate, seconds, 1)
    Machine(scheduler, jobs, seed=2, **given).run()
    assert all(one.refused + one.given_up + one.answered == 1 for one in jobs)
    return jobs


def share(jobs, name) -> float:
    own = [one.in_time for one in jobs if one.kind.name == name and one.answered]
    return sum(own) / len(own)


def test_through_a_burst_as_much_is_answered_as_can_be_and_nearly_all_of_it_in_time() -> None:
    def rate(now: float) -> float:
        return 150.0 if 2 <= now < 6 else 30.0

    full, _ = through(served("deadline", MIX, lambda _: 130.0, 4, admit=False), 1, 4)
    jobs = served("deadline", MIX, rate, 8)
    answered, good = through(jobs, 3, 6)
    assert answered > 0.85 * full and good > 0.8 * full
    kept = sum(one.in_time for one in jobs if one.answered) / sum(one.answered for one in jobs)
    assert kept > 0.93
    # Those with long deadlines do not take all the room of the many with short ones.
    taken = {name: [one.answered for one in jobs if one.kind.name == name and 3 < one.arrival < 6]
             for name in ("short", "long")}  # fmt: skip
    assert sum(taken["short"]) / len(taken["short"]) > 0.3
    assert sum(taken["long"]) / len(taken["long"]) > 0.2
    calm = [one.refused for one in jobs if one.arrival < 2 or one.arrival > 6.5]
    assert sum(calm) < 0.15 * len(calm)


def test_beyond_its_capacity_nearly_as_much_is_in_time_as_it_can_answer() -> None:
    full, _ = through(served("deadline", MIX, lambda _: 150.0, 5, admit=False), 1, 5)
    good = {share: through(served("deadline", MIX, lambda _, s=share: s * full, 8), 1, 8)[1]
            for share in (0.9, 1.2, 2.0)}  # fmt: skip
    assert min(good[1.2], good[2.0]) > 0.95 * max(good.values())
    assert min(good[1.2], good[2.0]) > 0.85 * full


def test_of_each_tier_the_admitted_are_in_time_and_few_are_refused() -> None:
    jobs = served("feedback", TIERS, lambda _: 80.0, 8)
    for name in ("L1", "L2", "L3"):
        assert share(jobs, name) >= 0.95
    assert sum(one.refused for one in jobs) < 0.15 * len(jobs)


def test_short_deadlines_pre_empt_and_nobody_starves() -> None:
    def l1(pressure: float) -> float:
        feedback = FeedbackSettings(pressure=pressure)
        jobs = served("feedback", TIERS, lambda _: 95.0, 8, admit=False, feedback=feedback)
        assert all(one.answered for one in jobs)
        return share(jobs, "L1")

    assert l1(2.0) > l1(0.0)


def test_the_table_has_every_load_with_and_without_admission() -> None:
    made = table(0.5, 1)
    assert made.row_count == 2 * (3 * len(TIERS) + 2 * len(MIX))
    assert not math.isnan(made.row_count)
