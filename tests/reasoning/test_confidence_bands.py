"""Confidence bands: which band a probability falls into, and how the hook is called."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.reasoning.confidence_bands import (
    Band,
    Bands,
    ChainPolicy,
    ChainStep,
    StepDecision,
    step_probability,
)
from deliberate.utils.errors import DeliberateError

probabilities = st.floats(0, 1)


@pytest.mark.parametrize(
    ("probability", "band"),
    [
        (1.0, Band.ANSWER),
        (0.95, Band.ANSWER),
        (0.949, Band.GO_ON),
        (0.80, Band.GO_ON),
        (0.799, Band.DELIBERATE),
        (0.0, Band.DELIBERATE),
    ],
)
def test_the_default_bands_begin_at_95_and_80_percent(probability, band):
    assert Bands().band(probability) is band


@given(low=probabilities, high=probabilities)
def test_more_confidence_never_means_a_lower_band(low, high):
    order = [Band.DELIBERATE, Band.GO_ON, Band.ANSWER]
    low, high = sorted((low, high))
    assert order.index(Bands().band(low)) <= order.index(Bands().band(high))


@pytest.mark.parametrize(
    "settings",
    [
        {"answer": 1.2},
        {"go_on": 0.0},
        {"go_on": -1.0},
        {"answer": math.nan},
        {"answer": 0.7, "go_on": 0.8},
    ],
)
def test_impossible_bands_are_one_line_that_names_the_value(settings):
    with pytest.raises(DeliberateError) as error:
        Bands(**settings)
    assert "\n" not in str(error.value) and "band" in str(error.value)


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_score_that_is_no_probability_is_refused(probability):
    with pytest.raises(DeliberateError, match="calibrate it first"):
        ChainPolicy().decide(0, probability)


def test_without_a_hook_an_uncertain_step_is_returned_as_it_is():
    assert ChainPolicy().decide(3, 0.5) == StepDecision(Band.DELIBERATE, 0.5, 0)


def test_the_hook_is_called_until_the_step_is_above_the_lowest_band():
    seen: list[ChainStep] = []

    def deliberate(step: ChainStep) -> float:
        seen.append(step)
        return step.probability + 0.2

    policy = ChainPolicy(deliberate=deliberate, max_rounds=5)
    decision = policy.decide(2, 0.5)
    assert decision.band is Band.GO_ON and decision.rounds == 2
    assert decision.probability == pytest.approx(0.9)
    assert [(step.index, step.rounds) for step in seen] == [(2, 0), (2, 1)]
    seen.clear()
    assert policy.decide(0, 0.85) == StepDecision(Band.GO_ON, 0.85, 0)
    assert not seen, "a step that is sure enough costs nothing"


def test_the_hook_is_called_at_most_as_often_as_rounds_are_allowed():
    policy = ChainPolicy(deliberate=lambda step: step.probability, max_rounds=3)
    assert policy.decide(0, 0.1) == StepDecision(Band.DELIBERATE, 0.1, 3)
    assert ChainPolicy(deliberate=lambda _: 1.0, max_rounds=0).decide(0, 0.1).rounds == 0
    with pytest.raises(DeliberateError, match="max_rounds"):
        ChainPolicy(max_rounds=-1)


def test_a_hook_that_returns_no_probability_is_refused():
    with pytest.raises(DeliberateError, match="probability 7"):
        ChainPolicy(deliberate=lambda _: 7.0).decide(0, 0.1)


@given(st.lists(probabilities, max_size=30))
def test_the_probability_of_a_step_is_the_product_of_its_tokens(values):
    joint = step_probability(values)
    assert joint == pytest.approx(math.prod(values), abs=1e-12)
    assert joint <= min(values, default=1.0) + 1e-12
