"""The feedback queue on a simulated clock: short ones first, nobody waits beyond the bound."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_plant import Job, Plant

from deliberate.engine.feedback_scheduler import FeedbackScheduler, FeedbackSettings
from deliberate.engine.scheduler import SchedulerSettings
from deliberate.engine.step_plan import RequestView, Traffic
from deliberate.utils.errors import DeliberateError


class Foretold:
    """Remaining time by the answers' true lengths, of the plant's machine."""

    def see(self, views) -> None:
        pass

    def seconds(self, view, running: int) -> float:
        prompt = 0 if view.made else view.tokens
        return 0.0001 * prompt + 0.002 * (view.limit - view.made)


class Wrong(Foretold):
    """Any prediction: a bound may not depend on it."""

    def seconds(self, view, running: int) -> float:
        return (view.id * 7919 + view.made * 104729) % 97 / (20 if running > 1 else 4000)


JOBS = st.builds(
    Job,
    arrival=st.floats(0, 0.3),
    prompt=st.integers(1, 40),
    answer=st.integers(1, 30),
    deadline=st.none() | st.floats(0, 3),
    exit_rate=st.none() | st.floats(0, 1),
    traffic=st.sampled_from(Traffic),
)
FEEDBACK = st.builds(
    FeedbackSettings,
    weight=st.floats(1, 3),
    aging=st.floats(0.001, 0.03),
    batch_share=st.floats(0.1, 1.0),
    max_wait=st.floats(0, 0.1),
    group=st.integers(1, 5),
    pressure=st.sampled_from([0.0, 2.0, 1e9]),
    alone=st.integers(0, 8),
)


def plant(jobs, feedback, remaining, **given):
    chosen = SchedulerSettings(**({"max_running": 3, "block_tokens": 8} | given))
    made = Plant(FeedbackScheduler(chosen, feedback, remaining), jobs, 100 * len(jobs))
    made.run()
    return made


@given(st.lists(JOBS, min_size=1, max_size=14), FEEDBACK, st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_nobody_is_overtaken_by_one_that_comes_after_the_bound(jobs, feedback, rows) -> None:
    made = plant(jobs, feedback, Wrong(), max_running=rows)
    assert len(made.finished) == len(jobs)
    for one in range(len(jobs)):
        for other in range(len(jobs)):
            late = jobs[other].arrival - jobs[one].arrival > feedback.bound + 1e-6
            if late:
                assert made.admitted.index(one) < made.admitted.index(other)


class Crowded(Foretold):
    """Remaining time that grows with the sequences that run, as the plant's machine has it."""

    def seconds(self, view, running: int) -> float:
        return super().seconds(view, running) * (1 + running) / 2


def test_a_short_request_whose_deadline_is_near_is_run_alone_and_then_all_go_on() -> None:
    jobs = [Job(0.0, 40, 30, traffic=Traffic.BATCH) for _ in range(3)]
    jobs.append(Job(0.02, 4, 3, deadline=0.05))

    def end(pressure: float, **given) -> tuple[float, Plant]:
        feedback = FeedbackSettings(pressure=pressure, batch_share=1.0, **given)
        made = plant(jobs, feedback, Crowded(), max_running=4)
        assert len(made.finished) == 4
        return made.finished[3], made

    alone, made = end(4.0)
    beside, plain = end(0.0)
    assert alone < beside
    # It had three tokens to make: the others were held up by no more than that.
    assert max(made.finished.values()) < max(plain.finished.values()) + 3 * 0.002
    assert end(4.0, alone=0)[0] == beside


@given(st.floats(0.001, 0.1), st.integers(2, 5), st.sampled_from([None, 0.5]))
@settings(max_examples=30, deadline=None)
def test_gathering_ends_in_time_and_is_not_for_those_in_a_hurry(wait, group, deadline) -> None:
    busy = Job(0.0, 1, 200)
    late = Job(0.01, 4, 2, deadline=deadline)
    made = plant([busy, late], FeedbackSettings(max_wait=wait, group=group), Foretold())
    waited = made.admitted_at[1] - late.arrival
    assert waited <= wait + 0.004  # the step that runs meanwhile
    if deadline is not None:
        assert waited <= 0.004
    elif wait > 0.01:
        assert waited > wait / 2


def test_a_group_does_not_wait_for_more() -> None:
    jobs = [Job(0.0, 1, 200), *(Job(0.01, 4, 2) for _ in range(3))]
    made = plant(jobs, FeedbackSettings(max_wait=1.0, group=3), Foretold(), max_running=4)
    assert all(made.admitted_at[one] < 0.02 for one in (1, 2, 3))


def test_short_ones_pass_long_ones_and_batch_requests_leave_rows_for_others() -> None:
    long = [Job(0.001 * at, 10, 300, traffic=Traffic.BATCH) for at in range(6)]
    short = [Job(0.1 + 0.01 * at, 4, 5) for at in range(6)]
    feedback = FeedbackSettings(aging=10.0)
    made = plant([*long, *short], feedback, Foretold(), max_running=4)
    assert max(made.finished[at] for at in range(6, 12)) < min(made.finished[at] for at in range(6))
    waits = [made.admitted_at[at] - short[at - 6].arrival for at in range(6, 12)]
    assert max(waits) < 0.2  # two of four rows are theirs


def test_places_rise_with_remaining_time_and_a_deadline_that_is_lost_counts_no_more() -> None:
    feedback = FeedbackSettings()
    view = RequestView(0, 5, 0.0)
    places = [feedback.place(0.0, view, one) for one in (0.0, 0.04, 0.1, 0.5, 3.0, 100.0)]
    assert places == sorted(places) and [int(one) for one in places] == [0, 0, 1, 2, 3, 3]
    quick = dataclasses.replace(view, traffic=Traffic.INTERACTIVE)
    assert feedback.place(0.0, quick, 0.06) == feedback.place(0.0, view, 0.04)
    due = dataclasses.replace(view, deadline=0.3)
    assert feedback.place(0.0, due, 0.29) < feedback.place(0.0, view, 0.05)  # hardly any slack
    assert feedback.place(0.0, due, 0.31) == feedback.place(0.0, view, 0.31)
    batch = dataclasses.replace(view, traffic=Traffic.BATCH)
    assert feedback.place(0.0, batch, 0.0) >= feedback.place(0.0, view, 1e9)
    assert max(places[-1], feedback.place(0.0, batch, 1e9)) <= len(feedback.levels) + 2


@pytest.mark.parametrize(
    "given",
    [{"levels": ()}, {"levels": (0.2, 0.1)}, {"weight": 0.5}, {"aging": 0.0}, {"batch_share": 0},
     {"max_wait": -1}, {"group": 0}],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_line(given) -> None:
    with pytest.raises(DeliberateError, match=next(iter(given))) as error:
        FeedbackSettings(**given)
    assert "\n" not in str(error.value)


def test_long_batch_work_is_admitted_though_short_requests_never_stop_coming() -> None:
    long = Job(0.0, 10, 30, traffic=Traffic.BATCH)
    short = [Job(0.003 * at, 4, 3) for at in range(400)]  # more than the machine can do
    feedback = FeedbackSettings(aging=0.05)
    made = plant([*short, long], feedback, Foretold(), max_running=1)
    before = made.admitted[: made.admitted.index(len(short))]
    assert len(before) > 20
    assert max(short[at].arrival for at in before) <= feedback.bound
