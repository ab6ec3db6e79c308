"""Which of two models answers, by the time that is left."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.policies.cascade import AnswerTimes, CascadeRule, Model
from deliberate.utils.errors import DeliberateError

RULE = CascadeRule(0.9)


@pytest.mark.parametrize(
    ("remaining", "model"),
    [(math.inf, Model.SMALL), (5.0, Model.SMALL), (4.5, Model.LARGE), (3.0, Model.SMALL)],
)
def test_the_small_model_is_first_where_both_fit_or_nothing_else_does(remaining, model) -> None:
    assert RULE.first(remaining, 1.0, 4.0) is model


def test_a_deadline_that_neither_meets_is_refused_with_the_least_that_could_be() -> None:
    with pytest.raises(DeliberateError, match="the least that could be is 1e"):
        RULE.first(0.5, 1.0, 4.0)
    assert RULE.first(0.5, None, None) is Model.SMALL  # nothing is known yet


def test_an_answer_that_is_not_sure_is_handed_over_where_there_is_time() -> None:
    assert RULE.hands_over(0.89, 4.0, 4.0)
    assert not RULE.hands_over(0.89, 3.9, 4.0)
    assert not RULE.hands_over(0.9, math.inf, 4.0)
    assert not CascadeRule(0.0).hands_over(0.0, math.inf, None)
    assert CascadeRule(math.inf).hands_over(1.0, math.inf, None)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=100))
def test_times_are_those_of_the_newest_answers(seconds) -> None:
    times = AnswerTimes(0.9)
    for one in seconds:
        times.note(one)
    newest = seconds[-64:]
    if len(seconds) < 4:
        assert times.expected is None and times.mean is None
        return
    covered = sum(one <= times.expected for one in newest) / len(newest)
    assert covered >= 0.9 and times.expected in newest
    assert times.mean == pytest.approx(sum(newest) / len(newest))
