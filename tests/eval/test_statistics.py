"""Intervals and tests against published figures, closed forms and their own invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.eval.statistics import (
    Interval,
    bootstrap_ratio_of_medians,
    mcnemar_exact,
    paired_difference_interval,
    percentiles,
    wilson_interval,
)

counts = st.integers(0, 60)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17:857-872, 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_the_published_table(correct, total, low, high):
    interval = wilson_interval(correct, total)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_interval_contains_the_share_and_mirrors(correct, total):
    correct = min(correct, total)
    interval, mirrored = wilson_interval(correct, total), wilson_interval(total - correct, total)
    assert correct / total in interval
    assert 0 <= interval.low < interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-9)


def test_no_problems_say_nothing_about_accuracy():
    assert wilson_interval(0, 0) == Interval(0.0, 1.0)
    assert paired_difference_interval(0, 0, 0, 0) == Interval(-1.0, 1.0)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 2**6), (8, 1, 2 * (1 + 9) / 2**9), (5, 5, 1.0)],
)
def test_mcnemar_equals_the_binomial_sum_by_hand(b, c, p):
    assert mcnemar_exact(b, c).p == pytest.approx(p)


@given(counts, counts)
def test_mcnemar_is_symmetric_and_a_probability(b, c):
    test = mcnemar_exact(b, c)
    assert test.p == pytest.approx(mcnemar_exact(c, b).p)
    assert 0 < test.p <= 1


def test_distinguishable_changes_sides_at_five_per_cent():
    assert not mcnemar_exact(5, 0).distinguishable  # p = 0.0625
    assert mcnemar_exact(6, 0).distinguishable  # p = 0.03125


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17:2635-2650, 1998, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
    ],
)
def test_paired_interval_matches_newcombe_method_10(table, low, high):
    interval = paired_difference_interval(*table)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(counts, counts, counts, counts)
def test_paired_interval_contains_the_difference_and_mirrors(both, gained, lost, neither):
    total = both + gained + lost + neither
    if total == 0:
        return
    interval = paired_difference_interval(both, gained, lost, neither)
    mirrored = paired_difference_interval(both, lost, gained, neither)
    assert interval.low - 1e-12 <= (gained - lost) / total <= interval.high + 1e-12
    assert interval.low == pytest.approx(-mirrored.high, abs=1e-9)
    assert -1 <= interval.low <= interval.high <= 1


def test_paired_interval_covers_at_its_level():
    rng = np.random.default_rng(1)
    chances = np.array([0.55, 0.06, 0.12, 0.27])
    tables = rng.multinomial(100, chances, size=400)
    hits = sum(-0.06 in paired_difference_interval(*map(int, table)) for table in tables)
    assert hits / 400 > 0.92


def test_ratio_of_medians_recovers_a_known_ratio():
    rng = np.random.default_rng(0)
    slow = rng.lognormal(1.0, 0.3, 200)
    estimate = bootstrap_ratio_of_medians(slow, slow / 2)
    assert estimate.value == pytest.approx(2.0)
    # Resampled together a constant ratio has no spread; resampled apart it would have.
    assert estimate.interval is not None
    assert estimate.interval.high - estimate.interval.low < 1e-9


def test_noise_gives_an_interval_around_one():
    rng = np.random.default_rng(3)
    estimate = bootstrap_ratio_of_medians(rng.lognormal(0, 0.3, 80), rng.lognormal(0, 0.3, 80))
    assert estimate.interval is not None and 1.0 in estimate.interval
    assert estimate.interval.high - estimate.interval.low > 0.05


@settings(max_examples=20)
@given(st.lists(st.tuples(*[st.floats(0.01, 100)] * 2), min_size=2, max_size=12), st.integers(0, 9))
def test_bootstrap_contains_its_estimate_and_repeats(pairs, seed):
    a, b = zip(*pairs, strict=True)
    first = bootstrap_ratio_of_medians(a, b, seed=seed, resamples=100)
    assert first == bootstrap_ratio_of_medians(a, b, seed=seed, resamples=100)
    assert first.interval is not None and first.value in first.interval


def test_one_problem_gives_a_ratio_without_an_interval():
    estimate = bootstrap_ratio_of_medians([3.0], [2.0])
    assert estimate.value == 1.5 and estimate.interval is None


def test_percentiles_interpolate_linearly():
    spread = percentiles(list(range(101)))
    assert (spread.median, spread.p90, spread.p99) == (50, 90, 99)
    assert percentiles([4.0]).p99 == 4.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(-1, 2),
        lambda: mcnemar_exact(-1, 0),
        lambda: percentiles([]),
        lambda: bootstrap_ratio_of_medians([1.0], [1.0, 2.0]),
        lambda: bootstrap_ratio_of_medians([1.0, 2.0], [1.0, 0.0]),
        lambda: Interval(1.0, 0.0),
        lambda: Interval(0.0, math.nan),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
