"""A candidate that is worse is rolled back, a better one promoted, an equal one rarely blamed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.lifecycle.ab_test import ABSettings, ABTest, Arm, Decision, Outcome
from deliberate.lifecycle.betting import BettingTest
from deliberate.utils.errors import DeliberateError

LIMITS = ABSettings(most_pairs=3000)


def compared(draw, *, slower=0.0, worse=0.0, errors=0.0, test=None, pairs=3000):
    """A comparison whose answers disagree in 2 % (`worse`: more) of 40 tokens, with noisy times."""
    test = test or ABTest(LIMITS)
    for _ in range(pairs):
        for arm in Arm:
            mine = arm is Arm.CANDIDATE
            if mine and draw.random() < errors:
                verdict = test.note(arm, Outcome(failed=True))
            else:
                time = math.exp(0.4 * draw.standard_normal()) * (1 + slower * mine)
                verdict = test.note(arm, Outcome(False, 0.005 * time))
            if verdict.decision is Decision.CONTINUE:
                verdict = test.note_loss(arm, draw.binomial(40, 0.02 + worse * mine) / 40)
            if verdict.decision is not Decision.CONTINUE:
                return test, verdict
    return test, verdict


@pytest.mark.parametrize(
    ("how", "reason", "most"),
    [
        ({"worse": 0.03}, "its loss is +", 1500),
        ({"slower": 0.3}, "time a token over", 1500),
        ({"errors": 0.1}, "requests failed", 150),
    ],
)
def test_a_candidate_that_is_worse_is_rolled_back(how, reason, most) -> None:
    for seed in range(3):
        test, verdict = compared(np.random.default_rng(seed), **how)
        assert verdict.decision is Decision.ROLL_BACK and reason in verdict.reason, verdict
        assert test.figures()["requests"] < most


@pytest.mark.parametrize("how", [{"slower": -0.2}, {"worse": -0.015, "slower": -0.01}])
def test_a_candidate_that_is_better_is_promoted(how) -> None:
    _, verdict = compared(np.random.default_rng(1), **how)
    assert verdict.decision is Decision.PROMOTE, verdict


def test_one_that_gains_nothing_is_given_up_after_the_stated_number_of_pairs() -> None:
    test = ABTest(ABSettings(most_pairs=50))
    for _ in range(50):
        for arm in Arm:
            verdict = test.note(arm, Outcome(False, 1.0))
    assert verdict.decision is Decision.ROLL_BACK and "no gain was shown in 50" in verdict.reason


def test_an_equal_candidate_is_blamed_more_rarely_than_alpha() -> None:
    """Each test at its limit, where it errs most: 400 times 1,500 observations."""
    draw = np.random.default_rng(3)
    for limit, low, values in (
        (0.5, 0.0, lambda: (draw.random(1500) < 0.5).astype(float)),
        (0.01, 0.0, lambda: (draw.random(1500) < 0.01).astype(float)),
        (0.01, -1.0, lambda: (draw.binomial(40, 0.03, 1500) - draw.binomial(40, 0.02, 1500)) / 40),
    ):
        wrong = 0
        for _ in range(400):
            test = BettingTest(limit, low, 1.0)
            test.update(values())
            wrong += test.rejects(0.05)
        assert wrong <= 30  # 20 expected at most; 3 standard errors more are 33


def test_a_comparison_goes_on_from_its_snapshot() -> None:
    test, _ = compared(np.random.default_rng(5), pairs=40)
    again = ABTest(LIMITS)
    again.restore(json.loads(json.dumps(test.snapshot())))
    assert again.figures() == test.figures() and again.pairs == 40
    ends = [compared(np.random.default_rng(6), slower=0.3, test=one) for one in (test, again)]
    assert ends[0][1] == ends[1][1] and ends[0][0].figures() == ends[1][0].figures()
    with pytest.raises(DeliberateError, match="no snapshot of a comparison"):
        ABTest().restore({"tests": {}})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), max_size=40), st.floats(-0.9, 0.9), st.integers(0, 40))
def test_what_is_seen_at_once_or_one_by_one_is_the_same(values, limit, cut) -> None:
    whole, parts = BettingTest(limit, -1.0, 1.0), BettingTest(limit, -1.0, 1.0)
    whole.update(values)
    parts.update(values[:cut])
    for value in values[cut:]:
        parts.update(value)
    assert parts.peak == pytest.approx(whole.peak) and parts.count == len(values)
    assert math.isfinite(whole.peak) and whole.peak >= 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BettingTest(1.0), "limit 1.0 must lie between"),
        (lambda: BettingTest(0.5).update(1.5), "outside \\[0, 1\\]"),
        (lambda: BettingTest(0.5).restore({"count": 1}), "no snapshot of a test"),
        (lambda: ABSettings(alpha=0.0), "alpha 0.0 must lie in"),
        (lambda: ABSettings(most_pairs=0), "most_pairs 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_an_error_in_one_line(call, text) -> None:
    with pytest.raises(DeliberateError, match=text):
        call()
