"""The planner of exact mode: exits that lose time rest, and drafts are as long as they pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_planner import FIRST_WHOLE, LONGEST_REST, REST, ROUND, DraftPlanner

READ = 0.2e-3


def planner(max_pending: int = 8, segments=(1e-3, 3e-3), slope: float = 0.05e-3) -> DraftPlanner:
    """One exit; passes of one to eight tokens have been timed."""
    made = DraftPlanner(1, max_pending, [READ])
    for _ in range(FIRST_WHOLE):
        made.token()
    for tokens in (1, 2, 4, 8) * 3:
        for index, seconds in enumerate(segments):
            made.segment(index, 1, tokens, seconds + slope * (tokens - 1))
    return made


def observe(made: DraftPlanner, asked: int, leaves: float, agrees: float) -> None:
    left = round(asked * leaves)
    for turn in range(asked):
        made.asked(0, turn < left)
    for turn in range(left):
        made.judged(0, turn < round(left * agrees), discarded=2)


def test_an_exit_that_saves_time_is_asked_and_one_that_never_lets_go_rests():
    good, idle = planner(), planner()
    observe(good, 40, leaves=0.8, agrees=0.98)
    observe(idle, 40, leaves=0.0, agrees=1.0)
    for made in (good, idle):
        made.review()
    assert good.asks(0) and good.value(0) > 0
    assert not idle.asks(0)


def test_an_exit_whose_drafts_are_refused_rests():
    made = planner()
    observe(made, 40, leaves=0.9, agrees=0.1)
    made.review()
    assert not made.asks(0)


def test_rests_grow_while_the_exit_stays_useless_and_end_when_it_pays_again():
    made, rests = planner(), []
    for _ in range(8):
        observe(made, 20, leaves=0.0, agrees=1.0)
        made.review()
        rests.append(0)
        while not made.asks(0):
            made.token()
            rests[-1] += 1
    assert rests[0] == REST
    assert rests == sorted(rests) and rests[-1] == LONGEST_REST
    observe(made, 20, leaves=0.9, agrees=1.0)
    made.review()
    assert made.asks(0)


def test_the_value_is_the_time_saved_less_the_time_asked():
    made = planner(segments=(1e-3, 3e-3), slope=0.0)
    observe(made, 100, leaves=0.5, agrees=1.0)
    # Half of the asks save the upper segment (agreement with a prior of two agreeing drafts is 1).
    assert made.value(0) == pytest.approx(0.5 * 3e-3 - READ, rel=1e-6)


def test_whole_passes_come_first_so_that_there_is_something_to_compare_with():
    made = DraftPlanner(2, 8, [READ, READ])
    assert not made.asks(0) and not made.asks(1)
    for _ in range(FIRST_WHOLE):
        made.token()
    assert made.asks(0) and made.asks(1)


def test_all_exits_rest_while_drafting_is_slower_than_whole_passes_whatever_the_reason():
    for pace, asks in ((1.3e-3, False), (0.7e-3, True)):
        made = DraftPlanner(2, 8, [READ, READ])
        for _ in range(FIRST_WHOLE):
            made.progress(1e-3, 1)
            made.token()
        for _ in range(ROUND // 2):
            made.progress(pace, 0)  # a draft: its time counts for the tokens verified next
            made.progress(pace, 2)
        assert made.asks(0) is asks and made.asks(1) is asks


def test_nobody_is_judged_before_enough_has_been_seen():
    made = planner()
    observe(made, 5, leaves=0.0, agrees=1.0)
    made.review()
    assert made.asks(0)


def test_drafts_grow_with_agreement_and_with_the_cost_of_depth():
    caps = {}
    for agrees in (0.5, 0.9, 1.0):
        made = planner(max_pending=12)
        observe(made, 100, leaves=1.0, agrees=agrees)
        made.review()
        caps[agrees] = made.cap
    assert caps[0.5] < caps[0.9] < caps[1.0] == 12
    dear = planner(max_pending=12, segments=(1e-3, 30e-3))
    observe(dear, 100, leaves=1.0, agrees=0.9)
    dear.review()
    assert dear.cap > caps[0.9]


def test_an_interruption_of_the_machine_does_not_count_as_a_cost():
    made = planner()
    observe(made, 40, leaves=0.8, agrees=0.98)
    before = made.value(0)
    made.segment(0, 1, 1, 2.0)
    assert made.value(0) == pytest.approx(before)


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["asked", "judged", "token", "review"]), st.booleans()),
        max_size=300,
    )
)
def test_the_cap_stays_within_bounds_and_values_are_numbers(events):
    made = planner(max_pending=6)
    for what, hit in events:
        if what == "asked":
            made.asked(0, hit)
        elif what == "judged":
            made.judged(0, hit, discarded=3)
        elif what == "token":
            made.token()
        else:
            made.review()
        assert 1 <= made.cap <= 6
        assert made.value(0) == made.value(0)


def test_exact_stops_asking_exits_of_a_model_whose_drafts_fail():
    """Random weights: the exits' tokens have nothing to do with the top's."""
    model = AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])
    settings = {"thresholds": 0.013, "max_new_tokens": 60, "return_dict_in_generate": True}
    first = model.generate(random_ids(5), fidelity="exact", **settings)
    for seed in range(1, 4):
        last = model.generate(random_ids(5, seed=seed), fidelity="exact", **settings)
    assert last.trace.drafted < first.trace.drafted / 2
    dense = model.generate(random_ids(5, seed=3), fidelity="dense", **settings)
    assert last.trace.tokens == dense.trace.tokens
