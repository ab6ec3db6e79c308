"""What the scheduler guarantees, on a simulated clock; and when a batch's deep passes are run."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_plant import Job, Plant

from deliberate.engine.scheduler import DeepSchedule, Scheduler, SchedulerSettings, rank
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.step_plan import RequestView, SequenceView
from deliberate.utils.errors import DeliberateError

JOBS = st.builds(
    Job,
    arrival=st.floats(0, 0.2),
    prompt=st.integers(1, 60),
    answer=st.integers(1, 30),
    priority=st.integers(0, 2),
    deadline=st.none() | st.floats(0, 1),
    growth=st.integers(1, 4),
    exit_rate=st.none() | st.floats(0, 1),
    max_pending=st.integers(1, 6),
)
SETTINGS = st.builds(
    SchedulerSettings,
    max_running=st.integers(1, 8),
    prefill_tokens=st.integers(1, 40),
    idle_prefill_tokens=st.integers(40, 80),
    long_share=st.floats(0.1, 1.0),
    block_tokens=st.integers(1, 16),
    aging=st.floats(0, 0.5),
    patience=st.floats(0, 0.5),
    deep=st.builds(DeepSchedule, st.floats(0.1, 1.0), st.integers(0, 5), st.floats(0.1, 2.0)),
)


def most_blocks(jobs, size):
    """Blocks of the longest of them alone."""
    return max(-(-(job.prompt + job.answer + 2 * job.growth + 1) // size) for job in jobs)


@given(st.lists(JOBS, min_size=1, max_size=12), SETTINGS, st.integers(0, 8), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_request_is_finished_whatever_arrives_and_however_scarce_blocks_are(
    jobs, chosen, more, seed
):
    # The plant checks each plan: blocks, prefill, bound on waiting, preemption after progress only.
    blocks = most_blocks(jobs, chosen.block_tokens) + more
    Plant(Scheduler(chosen), jobs, blocks, seed).run()


@given(st.lists(JOBS, min_size=1, max_size=12), SETTINGS, st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_nobody_is_preempted_where_blocks_suffice_for_all(jobs, chosen, seed):
    chosen = dataclasses.replace(chosen, max_running=len(jobs))
    plant = Plant(Scheduler(chosen), jobs, 100 * len(jobs), seed)
    plant.run()
    assert not plant.preempted


@given(st.lists(JOBS, min_size=2, max_size=12), SETTINGS, st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_a_request_is_never_overtaken_by_one_that_came_later_than_the_bound(jobs, chosen, more):
    blocks = most_blocks(jobs, chosen.block_tokens) + more
    plant = Plant(Scheduler(chosen), jobs, blocks)
    plant.run()
    order = {number: place for place, number in enumerate(plant.admitted)}
    for first, one in enumerate(jobs):
        for second, other in enumerate(jobs):
            levels = other.priority - one.priority
            if other.arrival > one.arrival + chosen.patience + chosen.aging * levels + 1e-9 and (
                other.arrival >= one.arrival
            ):
                assert order[first] < order[second]


def test_a_low_priority_request_runs_although_urgent_ones_never_stop_coming():
    chosen = SchedulerSettings(max_running=2, aging=0.1, patience=0.2)
    urgent = [Job(0.01 * number, 20, 20, priority=3) for number in range(300)]
    plant = Plant(Scheduler(chosen), [Job(0.0, 20, 200), *urgent], 100)
    while 0 not in plant.finished:
        plant.step()
    # patience + 3 levels of aging, and then its own 200 tokens beside one other.
    assert plant.first_token[0] < 0.2 + 0.3 + 0.2 and plant.finished[0] < 2.0
    assert len(plant.finished) < 200  # the others were still coming


def test_the_higher_priority_is_served_first_and_takes_the_blocks_of_the_lower():
    chosen = SchedulerSettings(max_running=8, block_tokens=4)
    late = Job(0.05, 20, 10, priority=1)
    plant = Plant(Scheduler(chosen), [Job(0.0, 20, 30), Job(0.01, 20, 30), late], 28)
    plant.run()
    assert plant.finished[2] < min(plant.finished[0], plant.finished[1])
    assert plant.preempted == {1: 1}  # of the lower priority, the one that came last


def test_the_last_to_come_is_preempted_and_the_first_is_not():
    jobs = [Job(0.001 * number, 8, 40) for number in range(4)]
    plant = Plant(Scheduler(SchedulerSettings(block_tokens=4)), jobs, 24)
    plant.run()
    assert 0 not in plant.preempted and 3 in plant.preempted
    assert sorted(plant.finished, key=plant.finished.__getitem__)[0] == 0


def test_within_a_priority_the_earliest_deadline_is_served_first():
    scheduler = Scheduler(SchedulerSettings(max_running=1))
    far, near, none = (
        RequestView(0, 5, 0.0, deadline=9.0),
        RequestView(1, 5, 0.0, deadline=3.0),
        RequestView(2, 5, 0.0),
    )
    assert [c[0] for c in scheduler.plan(1.0, [none, far, near], []).prefill] == [1]
    urgent = dataclasses.replace(none, id=3, priority=20)
    assert [c[0] for c in scheduler.plan(1.0, [near, urgent], []).prefill] == [3]


def test_the_prediction_of_the_remaining_time_brings_a_long_request_forward():
    by = rank(SchedulerSettings())
    short = RequestView(0, 5, 0.0, deadline=5.0, seconds_left=1.0)
    long = RequestView(1, 5, 0.0, deadline=6.0, seconds_left=4.0)
    assert by(1.0, long) < by(1.0, short)


def test_a_deadline_that_cannot_be_met_counts_no_more():
    by = rank(SchedulerSettings(patience=10.0))
    missed = RequestView(0, 5, 0.0, deadline=5.0, seconds_left=4.0)
    possible = RequestView(1, 5, 0.0, deadline=6.0, seconds_left=4.0)
    assert by(1.0, missed) < by(1.0, possible)
    assert by(1.5, missed) > by(1.5, possible)


def test_another_rank_can_be_given():
    scheduler = Scheduler(SchedulerSettings(max_running=1), lambda now, view: view.tokens)
    waiting = [RequestView(0, 50, 0.0), RequestView(1, 5, 1.0)]
    assert scheduler.plan(1.0, waiting, []).prefill == [(1, 0, 5)]


def test_a_short_prompt_passes_beside_a_long_one_and_nothing_of_the_budget_is_lost():
    chosen = SchedulerSettings(prefill_tokens=100, idle_prefill_tokens=100, long_share=0.75)
    long, short = RequestView(0, 1000, 0.0), RequestView(1, 10, 1.0)
    plan = Scheduler(chosen).plan(1.0, [long, short], [])
    assert plan.prefill == [(0, 0, 90), (1, 0, 10)]
    assert Scheduler(chosen).plan(1.0, [long], []).prefill == [(0, 0, 100)]


def test_prefill_is_smaller_while_others_decode_and_they_go_on():
    chosen = SchedulerSettings(prefill_tokens=16, idle_prefill_tokens=64)
    decoding = SequenceView(1, 9, 9, 0.0)
    plan = Scheduler(chosen).plan(0.0, [RequestView(0, 1000, 0.0)], [decoding])
    assert plan.prefill == [(0, 0, 16)] and plan.shallow == [1]


def test_one_request_prefills_a_shared_prefix_and_the_others_wait_for_it():
    scheduler = Scheduler(SchedulerSettings(block_tokens=4))
    prefix = ("a", "b")
    same = [RequestView(n, 10, 0.1 * n, keys=prefix) for n in range(3)]
    other = RequestView(3, 10, 1.0, keys=("c", "d"))
    assert [c[0] for c in scheduler.plan(1.0, [*same, other], []).prefill] == [0, 3]
    # While its last chunk is still to come, those behind it wait on; then they find it cached.
    leader = SequenceView(0, 6, 10, 0.0, keys=("b",), progressed=False)
    waits = [dataclasses.replace(view, cached=4, keys=("b",)) for view in same[1:]]
    assert [c[0] for c in scheduler.plan(1.0, waits, [leader]).prefill] == [0]
    found = [dataclasses.replace(view, cached=8, shared_blocks=2, keys=()) for view in same[1:]]
    assert [c[1] for c in scheduler.plan(1.0, found, []).prefill] == [8, 8]


def test_shared_blocks_take_nothing_from_the_free_ones():
    scheduler = Scheduler(SchedulerSettings(block_tokens=4))
    view = RequestView(1, 12, 0.0, cached=8)
    running = SequenceView(0, 12, 12, 0.0, capacity=16)
    assert not scheduler.plan(0.0, [view], [running], free_blocks=2).prefill
    shared = dataclasses.replace(view, shared_blocks=2)
    assert scheduler.plan(0.0, [shared], [running], free_blocks=2).prefill


def test_a_deep_pass_takes_those_with_enough_pending_and_runs_at_once_where_nothing_else_can():
    scheduler = Scheduler(SchedulerSettings(deep=DeepSchedule(0.5, 8, join=0.5)))
    blocked = SequenceView(0, 9, 9, 0.0, blocked=True, pending=4, max_pending=8)
    ready = blocked._replace(id=1, blocked=False)
    few = blocked._replace(id=2, blocked=False, pending=3)
    plan = scheduler.plan(0.0, [], [blocked, ready, few])
    assert (plan.deep, plan.shallow) == ([], [1, 2])  # one of three: less than the share
    plan = scheduler.plan(0.0, [], [blocked._replace(waited=8), ready, few])
    assert (plan.deep, plan.shallow) == ([0, 1], [2])
    late = Scheduler(SchedulerSettings(deep=DeepSchedule(1.0, 99, max_seconds=0.05)))
    assert not late.plan(0.04, [], [blocked, few]).deep
    assert late.plan(0.05, [], [blocked, few]).deep == [0]


def test_fuller_deep_passes_are_fewer():
    jobs = [Job(0.0, 10, 60, exit_rate=0.6) for _ in range(8)]

    def deep_passes(fullness):
        chosen = SchedulerSettings(deep=DeepSchedule(fullness, 8, 2.0))
        plant = Plant(Scheduler(chosen), jobs, 1000)
        plant.run()
        return plant.passes["deep"]

    assert deep_passes(0.75) < 0.7 * deep_passes(0.1)


def test_a_cache_too_small_for_one_request_is_an_error_and_no_endless_loop():
    scheduler = Scheduler(SchedulerSettings(block_tokens=16))
    with pytest.raises(DeliberateError, match="3 free blocks of 16 tokens"):
        scheduler.plan(0.0, [RequestView(0, 100, 0.0)], [], free_blocks=3)
    with pytest.raises(DeliberateError, match="1 running and 0 waiting"):
        scheduler.plan(0.0, [], [SequenceView(0, 16, 9, 0.0, capacity=16)], free_blocks=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_running": 0},
        {"prefill_tokens": 0},
        {"idle_prefill_tokens": 8},
        {"long_share": 0.0},
        {"block_tokens": 0},
        {"aging": -1.0},
        {"patience": float("nan")},
    ],
)
def test_impossible_settings_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(DeliberateError, match=f"scheduler {name} {value}"):
        SchedulerSettings(**wrong)


def test_a_request_whose_every_token_is_cached_is_an_error():
    with pytest.raises(DeliberateError, match="request 7: 5 of 5 tokens cached"):
        RequestView(7, 5, 0.0, cached=5)


def batch(*waited: int | None) -> list[DecodingSequence]:
    """Sequences that have waited for so many passes; None: not blocked."""
    made = [DecodingSequence(index, [], 3, 4) for index in range(len(waited))]
    for sequence, passes in zip(made, waited, strict=True):
        sequence.blocked, sequence.waited = passes is not None, passes or 0
    return made


@pytest.mark.parametrize(
    ("waited", "due"),
    [
        ((None, None, None, None), False),
        ((0, None, None, None), False),
        ((0, 0, None, None), True),  # exactly the share
        ((2, None, None, None), False),
        ((3, None, None, None), True),  # exactly the longest wait
        ((0,), True),
    ],
)
def test_a_deep_pass_is_due_at_the_share_of_blocked_sequences_or_the_longest_wait(waited, due):
    assert DeepSchedule(fullness=0.5, max_wait=3).is_due(batch(*waited)) is due


@pytest.mark.parametrize(
    "wrong",
    [
        {"fullness": 0.0},
        {"fullness": 1.1},
        {"max_wait": -1},
        {"join": 0.0},
        {"max_seconds": -1.0},
    ],
)
def test_impossible_schedules_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(DeliberateError, match=f"schedule {name} {value}"):
        DeepSchedule(**wrong)
