"""Latency budgets, whether they can be met, and the length that is still to come."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.engine.exit_policy import FixedPolicy
from deliberate.policies.budget import DEFAULT_TIERS, LatencyBudget, as_budget, feasibility
from deliberate.policies.lengths import LengthPredictor
from deliberate.trace import BatchTrace
from deliberate.utils.errors import DeliberateError


def refused(call, *words: str) -> None:
    with pytest.raises(DeliberateError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0.0, -5, math.nan, math.inf, "5", True])
@pytest.mark.parametrize("name", ["ms_per_token", "deadline_ms"])
def test_a_budget_that_is_no_positive_time_is_one_line_that_names_it(name, value):
    refused(lambda: LatencyBudget(**{name: value}), name, str(value))


def test_a_budget_is_one_of_the_two():
    refused(LatencyBudget, "none given")
    refused(lambda: LatencyBudget(ms_per_token=1, deadline_ms=1), "both given")


def test_tiers_are_deadlines_from_a_table():
    assert dict(DEFAULT_TIERS) == {"L1": 50.0, "L2": 200.0, "L3": 1000.0}
    assert LatencyBudget.tier("L2") == LatencyBudget(deadline_ms=200)
    assert as_budget("fast", {"fast": 5.0}) == LatencyBudget(deadline_ms=5)
    refused(lambda: LatencyBudget.tier("L9"), "L9", "L1 (50 ms)")


def test_users_may_write_a_budget_in_three_ways():
    budget = LatencyBudget(ms_per_token=2.5)
    assert as_budget(budget) is budget
    assert as_budget({"ms_per_token": 2.5}) == budget
    refused(lambda: as_budget({"ms": 2.5}), "'ms'")
    refused(lambda: as_budget(7), "7")  # type: ignore[arg-type]


@given(
    ms=st.floats(0.01, 1e4),
    least=st.floats(1e-5, 1.0),
    extra=st.floats(0, 1.0),
    tokens=st.floats(1, 1e4),
    prompt=st.floats(0, 1.0),
    deadline=st.booleans(),
)
def test_the_least_that_is_possible_is_feasible_and_less_is_not(
    ms, least, extra, tokens, prompt, deadline
):
    def ask(budget: LatencyBudget):
        return feasibility(
            budget,
            least_seconds_per_token=least,
            dense_seconds_per_token=least + extra,
            expected_tokens=tokens,
            prompt_seconds=prompt,
        )

    budget = LatencyBudget(deadline_ms=ms) if deadline else LatencyBudget(ms_per_token=ms)
    found = ask(budget)
    possible = found.least_ms if deadline else found.least_ms_per_token
    name = "deadline_ms" if deadline else "ms_per_token"
    assert found.feasible == (ms >= possible) or math.isclose(ms, possible, rel_tol=1e-9)
    if possible > 1e-6:  # below, a change of one in ten thousand may be none
        assert ask(LatencyBudget(**{name: possible * 1.0001})).feasible
        assert not ask(LatencyBudget(**{name: possible * 0.9999})).feasible
    assert not (found.ample and not found.feasible)
    assert not (found.tight and not found.feasible)


def test_an_infeasible_budget_is_reported_with_the_least_that_is_possible():
    found = feasibility(
        LatencyBudget(ms_per_token=1),
        least_seconds_per_token=2e-3,
        dense_seconds_per_token=8e-3,
        expected_tokens=101,
        prompt_seconds=2e-3,
    )
    assert not found.feasible and found.least_ms_per_token == pytest.approx(2.0)
    refused(found.require, "1 ms per token", "2 ms per token", "101 tokens")


@pytest.mark.parametrize(
    "change",
    [
        {"expected_tokens": 0},
        {"expected_tokens": math.nan},
        {"least_seconds_per_token": -1.0},
        {"dense_seconds_per_token": math.inf},
    ],
)
def test_impossible_costs_are_one_line(change):
    settings = {
        "least_seconds_per_token": 1.0,
        "dense_seconds_per_token": 2.0,
        "expected_tokens": 5,
    }
    refused(lambda: feasibility(LatencyBudget(deadline_ms=1), **(settings | change)), *change)


# -- lengths ---------------------------------------------------------------------------------------


def test_without_experience_the_limit_is_expected():
    predictor = LengthPredictor()
    assert predictor.mean(10, 100) == 90 and predictor.quantile(10, 100, 0.5) == 90


def test_the_remaining_length_is_the_residual_life_of_earlier_answers():
    predictor = LengthPredictor([10, 20, 30, 40, 50, 60], enough=2)
    assert predictor.mean(0, 1000) == pytest.approx(35)
    assert predictor.mean(35, 1000) == pytest.approx((5 + 15 + 25) / 3)
    assert predictor.quantile(35, 1000, 1.0) == 25 and predictor.quantile(35, 1000, 0.0) == 5


def test_answers_longer_than_any_before_are_expected_to_run_to_the_limit():
    predictor = LengthPredictor([10] * 50)
    assert predictor.mean(10, 200) == 190 and predictor.quantile(10, 200, 0.5) == 190


@given(
    lengths=st.lists(st.integers(1, 300), max_size=40),
    tokens=st.integers(0, 400),
    limit=st.integers(1, 400),
    share=st.floats(0, 1),
)
def test_the_remaining_length_lies_between_one_token_and_the_limit(lengths, tokens, limit, share):
    predictor = LengthPredictor(lengths)
    room = max(1, limit - tokens)
    assert 1 <= predictor.mean(tokens, limit) <= room
    assert 1 <= predictor.quantile(tokens, limit, share) <= room
    assert predictor.quantile(tokens, limit, 0) <= predictor.quantile(tokens, limit, share)


def test_only_the_latest_answers_are_remembered():
    predictor = LengthPredictor([500] * 8, capacity=8)
    for _ in range(8):
        predictor.observe(20)
    assert len(predictor) == 8 and predictor.mean(0, 1000) == 20
    refused(lambda: predictor.observe(0), "0 tokens")


# -- pacing ----------------------------------------------------------------------------------------


def test_a_fixed_policy_always_answers_the_same_and_refuses_nan():
    exit_policy = FixedPolicy([0.5, math.inf])
    exit_policy.begin(0.0, 3, 9, BatchTrace([]))
    exit_policy.on_step(1.0, 4)
    assert exit_policy.constant and exit_policy.thresholds == (0.5, math.inf)
    refused(lambda: FixedPolicy([math.nan]), "NaN")


def test_a_budget_that_the_least_time_meets_exactly_is_feasible():
    budget = LatencyBudget(ms_per_token=2.0)
    seconds = {"least_seconds_per_token": 0.002, "dense_seconds_per_token": 0.004}
    assert feasibility(budget, expected_tokens=1, prompt_seconds=0.002, **seconds).feasible
    assert not feasibility(budget, expected_tokens=1, prompt_seconds=0.0021, **seconds).feasible
