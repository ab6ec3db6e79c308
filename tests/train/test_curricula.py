"""Exit curricula and dropout schedules: invariants, and the paper's definitions by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.train.curricula import (
    DropoutSchedule,
    ExitCurriculum,
    active_exits,
    curriculum_weights,
    dropout_scale,
    gradual,
    rotational,
)
from deliberate.utils.errors import DeliberateError


@given(st.integers(0, 500), st.integers(1, 12), st.integers(1, 12))
def test_each_exit_is_on_once_in_as_many_steps_as_the_interval(start, exits, interval):
    counts = [0] * exits
    for step in range(start, start + interval):
        for index, on in enumerate(rotational(step, exits, interval=interval)):
            counts[index] += on
    assert counts == [1] * exits


def test_rotation_moves_on_by_one_exit_a_step():
    assert rotational(0, 5, interval=2) == (True, False, True, False, True)
    assert rotational(1, 5, interval=2) == (False, True, False, True, False)
    assert rotational(1, 5, interval=3) == (False, True, False, False, True)


@given(st.integers(1, 300), st.integers(1, 10), st.floats(0, 1))
def test_the_gradual_curriculum_adds_exits_from_the_deepest_and_never_takes_one_away(
    steps, exits, share
):
    before = [False] * exits
    for step in range(steps):
        now = gradual(step, steps, exits, share=share)
        assert now[-1]
        assert list(now) == sorted(now)
        assert all(late or not early for early, late in zip(before, now, strict=True))
        before = list(now)
        if step >= share * steps:
            assert all(now)


def test_gradual_exits_come_at_equal_distances_in_the_first_half():
    on = [sum(gradual(step, 80, 4)) for step in (0, 9, 10, 19, 20, 30, 40, 79)]
    assert on == [1, 1, 2, 2, 3, 4, 4, 4]


@given(
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=8).map(lambda w: [x / sum(w) for x in w]),
    st.data(),
)
def test_the_weights_of_a_step_sum_to_one_and_keep_their_proportions(weights, data):
    active = data.draw(
        st.lists(st.booleans(), min_size=len(weights) - 1, max_size=len(weights) - 1)
    )
    now = curriculum_weights(weights, active)
    assert math.isclose(sum(now), 1.0)
    for weight, of_step, on in zip(weights, now, [*active, True], strict=True):
        assert (of_step > 0) == on
        if on:
            assert math.isclose(of_step / now[-1], weight / weights[-1], rel_tol=1e-9)


def test_everything_is_on_without_a_curriculum():
    assert active_exits("all", 3, 10, 4) == (True,) * 4
    assert active_exits(ExitCurriculum.GRADUAL, 0, 10, 3) == (False, False, True)
    assert active_exits("rotational", 2, 10, 3, interval=3) == (False, False, True)


def test_the_exponential_schedule_rises_from_nothing_to_the_whole_rate():
    assert [dropout_scale("exponential", step, 5) for step in range(5)] == pytest.approx(
        [0.0, 2**0.25 - 1, 2**0.5 - 1, 2**0.75 - 1, 1.0]
    )
    assert dropout_scale("exponential", 9, 5) == 1.0  # a step after the last, as when evaluating
    assert dropout_scale(DropoutSchedule.CONSTANT, 0, 5) == dropout_scale("exponential", 0, 1) == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: active_exits("spiral", 0, 1, 1), "'spiral'"),
        (lambda: rotational(0, 3, interval=0), "interval 0"),
        (lambda: gradual(0, 3, 2, share=1.5), "1.5"),
        (lambda: dropout_scale("linear", 0, 1), "'linear'"),
        (lambda: curriculum_weights([0.5, 0.5], [True, True]), "2 weights for 2 exits"),
    ],
)
def test_impossible_curricula_are_named(call, named):
    with pytest.raises(DeliberateError, match=named):
        call()
