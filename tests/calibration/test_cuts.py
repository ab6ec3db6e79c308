"""Possible thresholds: what each takes, by hand and against a direct count."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.calibration.cuts import cuts


def test_equal_scores_are_one_threshold_and_the_strictest_comes_first():
    found = cuts(np.array([0.5, 0.9, 0.5, 0.1]), np.array([1.0, 2.0, 4.0, 8.0]))
    assert found.scores.tolist() == [0.9, 0.5, 0.1]
    assert found.counts.tolist() == [1, 3, 4]
    assert found.totals.tolist() == [2.0, 7.0, 15.0]


def test_no_token_allows_no_threshold():
    found = cuts(np.zeros(0), np.zeros(0))
    assert [len(part) for part in found] == [0, 0, 0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(-3, 3)), max_size=30))
def test_each_threshold_counts_and_sums_the_tokens_from_it_up(tokens):
    scores = np.array([score for score, _ in tokens], dtype=np.float32)
    values = np.array([value for _, value in tokens], dtype=np.int8)
    found = cuts(scores, values)
    assert found.scores.tolist() == sorted(set(scores.tolist()), reverse=True)
    for score, count, total in zip(*found, strict=True):
        taken = scores >= score
        assert (count, total) == (taken.sum(), values[taken].sum())
