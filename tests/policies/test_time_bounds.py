"""Predictions are stretched until the stated share of deadlines is kept, and no further."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.policies.time_bounds import TimeBounds
from deliberate.utils.errors import DeliberateError


def served(bounds: TimeBounds, spread, count: int, *, allowed: float = 1.0, seed: int = 0):
    """Requests of random size whose times are a random multiple of what is predicted; the share of
    those taken that were in time, and the share taken, of the second half."""
    dice, now, taken, kept = random.Random(seed), 0.0, 0, 0
    for number in range(count):
        now += 0.01
        predicted = dice.uniform(0.1, 1.0) * allowed
        if predicted * bounds.factor(allowed, 4, now) > allowed:
            continue
        took = predicted * spread(dice, number)
        bounds.note(allowed, 4, predicted, took, now)
        if 2 * number >= count:
            taken += 1
            kept += took <= allowed
    return kept / max(1, taken), 2 * taken / count


@pytest.mark.parametrize("share", [0.8, 0.95])
def test_the_share_is_kept_and_what_is_safe_is_taken(share) -> None:
    kept, taken = served(TimeBounds(share), lambda dice, _: dice.lognormvariate(0.3, 0.3), 4000)
    assert share - 0.02 <= kept and taken > 0.5


def test_the_share_is_kept_where_times_grow_and_fall_again() -> None:
    def spread(dice: random.Random, number: int) -> float:
        return (1 + (number // 500) % 3) * dice.lognormvariate(0.0, 0.2)

    kept, taken = served(TimeBounds(0.95), spread, 6000)
    assert kept > 0.91 and taken > 0.2


def test_a_pessimistic_prediction_is_shortened() -> None:
    bounds = TimeBounds(0.95)
    served(bounds, lambda dice, _: 0.5, 200)
    assert bounds.factor(1.0, 4, 2.0) == pytest.approx(0.5, rel=0.05)


def test_tiers_and_loads_are_apart_and_a_load_that_was_not_seen_is_as_its_nearest() -> None:
    bounds = TimeBounds(0.95)
    for _ in range(40):
        bounds.note(0.05, 16, 0.02, 0.06, 0.0)
        bounds.note(1.0, 1, 0.1, 0.1, 0.0)
        bounds.note(1.0, 16, 0.1, 0.2, 0.0)
    factors = [bounds.factor(1.0, load, 0.0) for load in (1, 2, 12, 64)]
    assert factors == pytest.approx([1, 1, 2, 2])
    assert bounds.factor(0.05, 16, 0.0) == pytest.approx(3)
    assert bounds.factor(8.0, 16, 0.0) == 1.0  # nothing is known of it


def test_what_is_known_is_forgotten_while_nothing_is_taken() -> None:
    bounds = TimeBounds(0.95, forget=2.0)
    for _ in range(20):
        bounds.note(1.0, 4, 0.1, 0.8, 10.0)
    factors = [bounds.factor(1.0, 4, now) for now in (10.0, 12.0, 40.0)]
    assert factors[0] == pytest.approx(8) and 1.5 < factors[1] < 3 and factors[2] < 1.01


def test_one_that_was_late_and_then_starved_does_not_speak_for_the_others() -> None:
    bounds = TimeBounds(0.95)
    for number in range(40):
        bounds.note(0.3, 9, 0.1, 9.0 if number == 20 else 0.15, 0.0)
    assert bounds.factor(0.3, 9, 0.0) <= 1.25 * 0.3 / 0.1


@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 10), st.integers(0, 300), st.floats(0, 5), st.floats(0, 50),
            st.floats(0, 100),
        ),
        max_size=60,
    )
)  # fmt: skip
def test_a_factor_is_within_the_ratios_that_were_seen(notes) -> None:
    bounds = TimeBounds(0.9)
    ratios = [1.0]
    for allowed, load, predicted, took, now in notes:
        bounds.note(allowed, load, predicted, took, now)
        if predicted > 0 and took > 0:
            ratios.append(min(took, 1.25 * allowed) / predicted)
    for allowed, load, *_, now in notes:
        low, high = min(ratios), max(ratios)
        assert low * 0.999 <= bounds.factor(allowed, load, now) <= high * 1.001


@pytest.mark.parametrize(
    "given_", [{"share": 0.0}, {"share": 1.0}, {"window": 4}, {"rate": 0.0}, {"forget": 0.0}]
)
def test_values_that_are_not_allowed_are_named(given_) -> None:
    with pytest.raises(DeliberateError, match=next(iter(given_))):
        TimeBounds(**{"share": 0.9} | given_)
