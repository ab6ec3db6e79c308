"""The planner of exact mode: disables exits that lose time, and drafts as far as it saves time."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.draft_planner import (
    DISABLED,
    FIRST_FULL,
    LONGEST_DISABLED,
    ROUND,
    SURE_ROUNDS,
    DraftPlanner,
)
from deliberate.engine.loop_settings import LoopSettings, Stopwatch

READ = 0.2e-3


def planner(max_pending: int = 8, segments=(1e-3, 3e-3), slope: float = 0.05e-3) -> DraftPlanner:
    """One exit; passes of one to eight tokens have been timed."""
    made = DraftPlanner(1, max_pending, [READ])
    for _ in range(FIRST_FULL):
        made.token_fed()
    for tokens in (1, 2, 4, 8) * 3:
        for index, seconds in enumerate(segments):
            made.segment(index, 1, tokens, seconds + slope * (tokens - 1))
    return made


def observe(made: DraftPlanner, evaluated: int, exits: float, agrees: float) -> None:
    exited = round(evaluated * exits)
    for turn in range(evaluated):
        made.evaluated(0, turn < exited)
    for turn in range(exited):
        made.verified(0, turn < round(exited * agrees), discarded=2)


def test_an_exit_that_saves_time_is_evaluated_and_one_without_exits_is_disabled():
    good, idle = planner(), planner()
    observe(good, 40, exits=0.8, agrees=0.98)
    observe(idle, 40, exits=0.0, agrees=1.0)
    for made in (good, idle):
        made.review()
    assert good.is_enabled(0) and good.value(0) > 0
    assert not idle.is_enabled(0)


def test_an_exit_whose_drafts_are_rejected_is_disabled():
    made = planner()
    observe(made, 40, exits=0.9, agrees=0.1)
    made.review()
    assert not made.is_enabled(0)


def test_an_exit_is_disabled_for_longer_while_it_stays_useless_until_it_saves_time():
    made, disabled = planner(), []
    for _ in range(8):
        observe(made, 20, exits=0.0, agrees=1.0)
        made.review()
        disabled.append(0)
        while not made.is_enabled(0):
            made.token_fed()
            disabled[-1] += 1
    assert disabled[0] == DISABLED
    assert disabled == sorted(disabled) and disabled[-1] == LONGEST_DISABLED
    observe(made, 20, exits=0.9, agrees=1.0)
    made.review()
    assert made.is_enabled(0)


def test_the_value_is_the_time_saved_less_the_time_of_evaluating():
    made = planner(segments=(1e-3, 3e-3), slope=0.0)
    observe(made, 100, exits=0.5, agrees=1.0)
    # Half of the evaluations save the upper segment; two agreeing drafts as a prior keep 1.
    assert made.value(0) == pytest.approx(0.5 * 3e-3 - READ, rel=1e-6)


def test_full_depth_passes_come_first_to_compare_with():
    made = DraftPlanner(2, 8, [READ, READ])
    assert not made.is_enabled(0) and not made.is_enabled(1)
    for _ in range(FIRST_FULL):
        made.token_fed()
    assert made.is_enabled(0) and made.is_enabled(1)


def test_all_exits_are_disabled_while_drafting_is_slower_than_full_depth():
    for pace, enabled in ((1.3e-3, False), (0.7e-3, True)):
        made = DraftPlanner(2, 8, [READ, READ])
        for _ in range(FIRST_FULL):
            made.progress(1e-3, 1)
            made.token_fed()
        for _ in range(ROUND // 2):
            made.progress(pace, 0)  # a draft: its time counts for the tokens verified next
            made.progress(pace, 2)
        assert made.is_enabled(0) is enabled and made.is_enabled(1) is enabled


def test_no_exit_is_disabled_before_it_was_evaluated_often_enough():
    made = planner()
    observe(made, 5, exits=0.0, agrees=1.0)
    made.review()
    assert made.is_enabled(0)


def test_drafts_grow_with_agreement_and_with_the_cost_of_depth():
    caps = {}
    for agrees in (0.5, 0.9, 1.0):
        made = planner(max_pending=12)
        observe(made, 100, exits=1.0, agrees=agrees)
        made.review()
        caps[agrees] = made.cap
    assert caps[0.5] < caps[0.9] < caps[1.0] == 12
    costly = planner(max_pending=12, segments=(1e-3, 30e-3))
    observe(costly, 100, exits=1.0, agrees=0.9)
    costly.review()
    assert costly.cap > caps[0.9]


def test_an_interruption_of_the_machine_does_not_count_as_a_cost():
    made = planner()
    observe(made, 40, exits=0.8, agrees=0.98)
    before = made.value(0)
    made.segment(0, 1, 1, 2.0)
    assert made.value(0) == pytest.approx(before)


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["evaluated", "verified", "token", "review"]), st.booleans()),
        max_size=300,
    )
)
def test_the_cap_stays_within_bounds_and_values_are_numbers(events):
    made = planner(max_pending=6)
    for what, hit in events:
        if what == "evaluated":
            made.evaluated(0, hit)
        elif what == "verified":
            made.verified(0, hit, discarded=3)
        elif what == "token":
            made.token_fed()
        else:
            made.review()
        assert 1 <= made.cap <= 6
        assert made.value(0) == made.value(0)


def test_exact_stops_evaluating_exits_whose_drafts_are_rejected():
    """Random weights: the exits' tokens have nothing to do with full depth's."""
    model = AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])
    settings = {"thresholds": 0.013, "max_new_tokens": 60, "return_dict_in_generate": True}
    first = model.generate(random_ids(5), fidelity="exact", **settings)
    drafted = []
    for seed in (5, 4, 2, 1, 3):
        last = model.generate(random_ids(5, seed=seed), fidelity="exact", **settings)
        drafted.append(last.trace.drafted)
    # The planner reads a real clock: a stall of the machine may make one generation try again.
    assert min(drafted[-3:]) < first.trace.drafted / 2
    dense = model.generate(random_ids(5, seed=3), fidelity="dense", **settings)
    assert last.trace.tokens == dense.trace.tokens


def test_a_new_exit_is_judged_after_twelve_evaluations_and_one_tried_again_after_six():
    made = planner()
    for needed in (12, 6):
        observe(made, needed - 1, exits=0.0, agrees=1.0)
        made.review()
        assert made.is_enabled(0)
        observe(made, 1, exits=0.0, agrees=1.0)
        made.review()
        assert not made.is_enabled(0)
        while not made.is_enabled(0):
            made.token_fed()


@pytest.mark.parametrize(("settings", "passes"), [({}, 2), ({"probe_passes": 5}, 5)])
def test_full_depth_is_timed_again_after_256_verified_tokens(settings, passes):
    made = DraftPlanner(1, 8, [READ], **settings)
    while not made.is_enabled(0):
        made.progress(1e-3, 1)
        made.token_fed()
    verified = 0
    while made.is_enabled(0):
        made.progress(1e-3, 2)
        verified += 2
    assert (verified, made.disabled_tokens) == (256, passes)


def test_the_value_charges_rejected_drafts_and_what_was_discarded_with_them():
    made = planner(segments=(1e-3, 3e-3), slope=0.0)
    observe(made, 100, exits=1.0, agrees=0.5)
    agrees = (50 + 2) / (100 + 2)
    lost = (2 * 50 + 1) / (50 + 1) * (1e-3 + READ)
    assert made.value(0) == pytest.approx(agrees * 3e-3 - (1 - agrees) * lost - READ, rel=1e-6)


def test_old_observations_fade():
    made = planner()
    observe(made, 2000, exits=1.0, agrees=1.0)
    assert made.value(0) > 0
    observe(made, 300, exits=1.0, agrees=0.0)
    assert made.value(0) < 0


def test_an_exit_that_saves_time_again_is_disabled_for_a_shorter_time_next():
    made, disabled = planner(), []
    for exits in (0.0, 0.0, 0.9, 0.0):
        observe(made, 1000, exits=exits, agrees=1.0)
        made.review()
        disabled.append(made.disabled_tokens)
        while not made.is_enabled(0):
            made.token_fed()
    assert disabled == [32, 64, 0, 64]


def test_drafts_are_short_where_a_deferred_token_costs_as_much_as_a_full_pass():
    made = planner(max_pending=12, segments=(0.6e-3, 0.7e-3), slope=0.52e-3)
    observe(made, 100, exits=1.0, agrees=1.0)
    made.review()
    assert made.cap == 1


def test_an_interruption_while_drafting_does_not_disable_the_exits():
    made = DraftPlanner(1, 8, [READ])
    for _ in range(FIRST_FULL):
        made.progress(1e-3, 1)
        made.token_fed()
    for step in range(2 * ROUND):
        made.progress(2.0 if step == ROUND // 2 else 0.7e-3, 1)
        assert made.is_enabled(0)


@pytest.mark.parametrize("executor", ["generic", "fused"])
def test_the_planner_is_told_of_every_token_that_is_fed(executor):
    class Counting(DraftPlanner):
        fed = 0

        def token_fed(self, tokens=1):
            self.fed += tokens
            super().token_fed(tokens)

    base = tiny_model("llama", layers=6, dtype=torch.float32)
    model = AdaptiveModel(base, [1, 2, 4], executor=executor)
    settings = LoopSettings(
        exits=(1, 2, 4),
        thresholds=(0.013,) * 3,
        fidelity=Fidelity.EXACT,
        max_pending=5,
        max_new_tokens=60,
    )
    made = Counting(3, 5, [READ] * 3)
    loop = DecodeLoop(model.backbone, model.reader(), settings, planner=made)
    list(loop.run(random_ids(5)))
    assert made.fed == sum(one.segment == 0 for one in loop.batch.passes)


def test_what_drafting_costs_a_lone_sequence_says_nothing_of_eight():
    made = DraftPlanner(1, 8, [READ])
    alone, eight = made.of_load(1), made.of_load(8)
    assert made.of_load(5) is eight and made.of_load(9) is not eight and alone is not eight
    while not eight.is_enabled(0):
        eight.progress(1e-3, 8)
        eight.token_fed()
    for _ in range(ROUND + 1):  # the first round counts for nothing
        eight.progress(1.5e-3, 8)
    assert not eight.is_enabled(0)
    for _ in range(2 * FIRST_FULL):
        alone.token_fed()
    assert alone.is_enabled(0)


def test_the_step_that_verifies_the_last_drafts_of_others_is_no_full_depth_pass():
    made = DraftPlanner(1, 8, [READ]).of_load(4)
    while not made.is_enabled(0):
        made.progress(1e-3, 4)
        made.token_fed()
    for _ in range(ROUND + 1):
        made.progress(1.2e-3, 4)
    assert not made.is_enabled(0)
    for _ in range(9):  # each time the first step also verifies, and takes long
        made.progress(1.5e-3, 4)
        while not made.is_enabled(0):
            made.token_fed()
        for _ in range(ROUND + 1):
            made.progress(1.2e-3, 4)
        assert not made.is_enabled(0)


def test_a_planner_counts_the_steps_of_a_batch_not_its_sequences():
    class Counting(DraftPlanner):
        fed = 0

        def token_fed(self, tokens=1):
            self.fed += tokens
            super().token_fed(tokens)

    base = tiny_model("llama", layers=6, dtype=torch.float32)
    model = AdaptiveModel(base, [1, 2, 4])
    settings = LoopSettings(
        exits=(1, 2, 4),
        thresholds=(2.0,) * 3,
        fidelity=Fidelity.EXACT,
        max_pending=5,
        max_new_tokens=20,
    )
    made = Counting(3, 5, [READ] * 3)
    loop = DecodeLoop(model.backbone, model.reader(), settings, planner=made)
    list(loop.run(torch.cat([random_ids(5), random_ids(5, seed=1)])))
    assert made.fed == 19


def test_drafting_that_stays_slower_is_tried_less_and_less_often_by_many_sequences():
    def disabled_steps(rows):
        made, steps = DraftPlanner(1, 8, [READ]).of_load(rows), []
        for _ in range(4):
            steps.append(0)
            while not made.is_enabled(0):
                made.progress(1e-3, rows)
                made.token_fed()
                steps[-1] += 1
            while made.is_enabled(0):
                made.progress(1.5e-3, rows)
        return steps[1:]

    assert disabled_steps(1) == [DISABLED, 2 * DISABLED, 4 * DISABLED]
    assert disabled_steps(8) == [DISABLED, 4 * DISABLED, 16 * DISABLED]


def shared(rows: int) -> DraftPlanner:
    """A planner whose exits are enabled, after full-depth passes of 1 ms a token."""
    made = DraftPlanner(1, 8, [READ]).of_load(rows)
    while not made.is_enabled(0):
        made.progress(1e-3 * rows, rows)
        made.token_fed()
    return made


def test_the_round_in_which_drafting_begins_does_not_count_against_it():
    """Its time has drafts of sequences that no deep pass has served yet."""
    made = shared(8)
    made.progress(1.0, 8)
    for _ in range(4 * ROUND):
        made.progress(0.9e-3 * 8, 8)
        assert made.is_enabled(0)


@pytest.mark.parametrize(("pace", "rounds"), [(1.3e-3, ROUND), (1.05e-3, SURE_ROUNDS * ROUND)])
def test_what_is_a_little_slower_is_measured_for_longer(pace, rounds):
    made, counted = shared(8), -1
    while made.is_enabled(0):
        made.progress(8 * pace, 8)
        counted += 1
    assert counted == rounds


def test_a_stall_of_the_machine_does_not_end_drafting_of_many():
    made = shared(8)
    for step in range(3 * ROUND):
        made.progress((5e-3 if step % 8 == 4 else 0.7e-3) * 8, 8)
        assert made.is_enabled(0)


def test_ways_to_decode_are_compared_by_processor_time_on_a_cpu():
    watch = Stopwatch(on_cpu=True)
    began = watch.work()
    time.sleep(0.05)
    assert watch.work() - began < 0.03
    own = lambda: 3.0  # noqa: E731
    assert Stopwatch(own, on_cpu=True).work is own and Stopwatch().work is time.perf_counter


def test_steps_of_one_call_count_as_those_of_as_many_calls():
    one, other = (DraftPlanner(2, 8, [1e-5, 1e-5]) for _ in range(2))
    for _ in range(3):
        one.token_fed()
        one.segment(0, 1, 1, 2e-4)
    for hit in (True, True, False):
        one.evaluated(0, hit)
    other.token_fed(3)
    other.segment(0, 1, 1, 2e-4, 3)
    other.evaluated(0, True, 2)
    other.evaluated(0, False)
    assert one.disabled_tokens == other.disabled_tokens
    assert one._segments == other._segments
    assert one._exited == other._exited
