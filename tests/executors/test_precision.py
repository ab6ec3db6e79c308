"""The assignment of storages is the best that fits, and is never larger than its budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.executors.precision import assign
from deliberate.utils.errors import DeliberateError

NAMES = ("native", "q8_0", "int4")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.integers(1, 50)] * 3, *[st.integers(0, 20)] * 3), min_size=1, max_size=4
    ),
    st.floats(0, 1),
)
def test_it_is_the_best_of_all_plans_that_fit(units, share):
    sizes = [dict(zip(NAMES, one[:3], strict=True)) for one in units]
    losses = [dict(zip(NAMES, one[3:], strict=True)) for one in units]
    least, most = (sum(f(own.values()) for own in sizes) for f in (min, max))
    budget = round(least + share * (most - least))
    every = itertools.product(NAMES, repeat=len(units))

    def of(table, plan) -> int:
        return sum(own[name] for own, name in zip(table, plan, strict=True))

    best = min(of(losses, plan) for plan in every if of(sizes, plan) <= budget)
    found = assign(sizes, losses, budget)
    assert of(sizes, found) <= budget and of(losses, found) == best


def test_a_budget_that_nothing_fits_is_an_error():
    with pytest.raises(DeliberateError, match="a budget of 9 bytes: the smallest plan has 10"):
        assign([{"int4": 10, "native": 80}], [{"int4": 1, "native": 0}], 9)
    with pytest.raises(DeliberateError, match="sizes and losses of the same storages"):
        assign([{"int4": 10}], [{"native": 0}], 90)
