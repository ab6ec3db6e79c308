"""Calibrators and reliability."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_recordings import sigmoid, synthetic_recording

from deliberate.calibration.calibrator import (
    MIN_OF_EACH,
    MIN_SEQUENCES,
    MIN_TOKENS,
    Calibrator,
    Form,
    fit_calibrator,
)
from deliberate.calibration.reliability import equal_mass_bins, reliability
from deliberate.utils.errors import DeliberateError

probabilities = st.floats(0.001, 0.999)
isotonic = st.lists(
    st.tuples(st.floats(0, 1), probabilities), min_size=1, max_size=12, unique_by=lambda k: k[0]
).map(
    lambda knots: Calibrator(
        Form.ISOTONIC, tuple(sorted(x for x, _ in knots)), tuple(sorted(p for _, p in knots))
    )
)
logistic = st.builds(
    lambda slope, intercept, tokens: Calibrator(
        Form.LOGISTIC, slope=slope, intercept=intercept, tokens=tokens
    ),
    st.floats(0.01, 5),
    st.floats(-5, 5),
    st.integers(1, 10_000),
)


def sample(sequences=100, tokens=20, *, seed=0, curve=lambda s: sigmoid(3 * s - 1)):
    random = np.random.default_rng(seed)
    scores = random.random(sequences * tokens)
    agrees = random.random(len(scores)) < curve(scores)
    return scores, agrees, np.repeat(np.arange(sequences), tokens)


def test_logistic_data_get_a_logistic_curve_close_to_the_truth() -> None:
    def truth(s):
        return sigmoid(1.5 * (np.log(s) - np.log1p(-s)) + 0.5)

    scores, agrees, sequence = sample(1000, curve=truth)
    fitted = fit_calibrator(scores, agrees, sequence)
    assert fitted.form is Form.LOGISTIC
    grid = np.linspace(0.02, 0.98, 50)
    np.testing.assert_allclose(fitted(grid), truth(grid), atol=0.02)


def test_a_step_gets_an_isotonic_curve_close_to_the_truth() -> None:
    def truth(s):
        return np.where(s < 0.3, 0.5, 0.9)

    scores, agrees, sequence = sample(1000, curve=truth)
    fitted = fit_calibrator(scores, agrees, sequence)
    assert fitted.form is Form.ISOTONIC
    assert fitted.log_loss["isotonic"] < fitted.log_loss["logistic"]
    np.testing.assert_allclose(fitted([0.1, 0.2, 0.4, 0.8]), [0.5, 0.5, 0.9, 0.9], atol=0.03)


def test_forms_are_compared_on_other_sequences_than_they_were_fitted_on() -> None:
    # every sequence has one score of its own and one fate: an isotonic fit that saw it knows it
    random = np.random.default_rng(0)
    ease = random.random(120)
    fate = random.random(120) < 0.2 + 0.6 * ease
    scores, agrees = np.repeat(ease, 20), np.repeat(fate, 20)
    fitted = fit_calibrator(scores, agrees, np.repeat(np.arange(120), 20))
    assert fitted.form is Form.LOGISTIC
    split_by_token = fit_calibrator(
        scores, agrees, random.permutation(np.repeat(np.arange(120), 20))
    )
    assert split_by_token.log_loss["isotonic"] < fitted.log_loss["isotonic"]


def test_no_sample_however_one_sided_gives_certainty() -> None:
    # above 0.5 all agree, below none does
    scores, _, sequence = sample(50)
    agrees = scores > 0.5
    fitted = fit_calibrator(scores, agrees, sequence)
    surest, unlikeliest = fitted([1.0, 0.0])
    bound = 0.5 / (len(scores) + 1)
    assert 1 - surest >= bound * 0.999 and unlikeliest >= bound * 0.999
    assert 1 - surest < 5 / len(scores)


@settings(max_examples=200, deadline=None)
@given(st.one_of(isotonic, logistic), st.floats(0, 1), st.floats(0, 1))
def test_the_map_never_falls_and_least_score_inverts_it(calibrator, score, wanted) -> None:
    grid = np.linspace(0, 1, 101)
    assert (np.diff(calibrator(grid)) >= -1e-12).all()
    assert 0 < calibrator(score) < 1
    least = calibrator.least_score(wanted)
    if math.isinf(least):
        assert calibrator(1.0) < wanted
    else:
        assert calibrator(least) >= wanted - 1e-9
        if least > 0:
            assert calibrator(np.nextafter(least - 1e-6, 0)) <= wanted + 1e-9


@given(st.one_of(isotonic, logistic))
def test_json_changes_nothing(calibrator) -> None:
    assert Calibrator.from_dict(calibrator.to_dict()) == calibrator


def test_applying_needs_neither_scikit_learn_nor_torch() -> None:
    code = (
        "import sys; from deliberate.calibration.calibrator import Calibrator;"
        "c = Calibrator('isotonic', (0.2, 0.8), (0.3, 0.7)); print(round(float(c(0.5)), 9));"
        "print(sorted({'sklearn', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "0.5\n[]\n"


def few(sequences=MIN_SEQUENCES, tokens=50, wrong=MIN_OF_EACH):
    size = sequences * tokens
    agrees = np.ones(size, dtype=bool)
    agrees[:wrong] = False
    return np.linspace(0, 1, size), agrees, np.repeat(np.arange(sequences), tokens)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ((np.empty(0), np.empty(0, dtype=bool), np.empty(0)), "is empty"),
        (few(wrong=0), "every one of 1000 tokens agrees"),
        (few(wrong=1000), "every one of 1000 tokens disagrees"),
        (few(wrong=MIN_OF_EACH - 1), "9 disagreements are too few"),
        (few(wrong=1000 - 3), "3 agreements are too few"),
        (few(sequences=MIN_SEQUENCES - 1), "19 sequences are too few"),
        (few(tokens=MIN_TOKENS // MIN_SEQUENCES - 1), "480 tokens are too few"),
        ((np.array([np.nan, 0.5]), np.array([True, False]), np.array([0, 1])), "NaN"),
        ((np.zeros(3), np.zeros(2, dtype=bool), np.zeros(3)), "one of each per token"),
    ],
)
def test_too_little_data_is_one_line_that_says_how_much_is_needed(arrays, named) -> None:
    with pytest.raises(DeliberateError, match=f"exit 3: .*{named}") as caught:
        fit_calibrator(*arrays, name="exit 3")
    assert "\n" not in str(caught.value)


def test_just_enough_data_are_enough() -> None:
    assert fit_calibrator(*few()).tokens == 1000


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"form": "isotonic"}, "at least one knot"),
        ({"form": "isotonic", "scores": [0.5, 0.2], "probabilities": [0.1, 0.2]}, "must not fall"),
        ({"form": "isotonic", "scores": [0.2, 0.5], "probabilities": [0.5, 1.0]}, "strictly"),
        ({"form": "logistic", "slope": -1.0}, "must not be negative"),
        ({"form": "logistic", "slope": math.inf}, "finite"),
        ({"form": "cubic"}, "cubic"),
        ({"form": "logistic", "extra": 1}, "extra"),
    ],
)
def test_a_damaged_calibrator_is_refused(settings_, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        Calibrator.from_dict(settings_)


def test_calibration_error_of_true_probabilities_is_small_and_of_shifted_ones_the_shift() -> None:
    random = np.random.default_rng(0)
    p = random.uniform(0.2, 0.8, 60_000)
    agrees = random.random(len(p)) < p
    assert reliability(p, agrees).ece < 0.01
    shifted = reliability(p + 0.1, agrees)
    assert shifted.ece == pytest.approx(0.1, abs=0.01)
    assert shifted.mean_gap == pytest.approx(0.1, abs=0.01)


def test_a_fitted_calibrator_is_within_two_percent_on_fresh_sequences() -> None:
    fit, fresh = synthetic_recording(300, seed=1), synthetic_recording(500, seed=2)
    for k in range(3):
        calibrator = fit_calibrator(fit.scores[:, k], fit.agrees[:, k], fit.sequence)
        found = reliability(calibrator(fresh.scores[:, k]), fresh.agrees[:, k])
        raw = reliability(fresh.scores[:, k].astype(float), fresh.agrees[:, k])
        assert found.ece < 0.02 < raw.ece


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.21, 0.5, 0.9, 0.99]), min_size=1, max_size=400),
    st.integers(1, 15),
)
def test_bins_rise_are_not_empty_and_keep_equal_values_together(values, bins) -> None:
    p = np.array(values)
    index = equal_mass_bins(p, bins)
    assert set(index) == set(range(index.max() + 1)) and index.max() < max(bins, 1) + 15
    for value in set(values):
        assert len(set(index[p == value])) == 1
    order = np.argsort(p, kind="stable")
    assert (np.diff(index[order]) >= 0).all()


def test_one_value_that_nearly_all_tokens_have_does_not_swallow_the_rest() -> None:
    p = np.concatenate([np.linspace(0.1, 0.9, 700), np.full(9300, 0.999)])
    found = reliability(p, np.ones(len(p), dtype=bool))
    assert len(found.bins) == 15 and found.bins[-1].tokens == 9300
    assert found.tokens == len(p)


def test_reliability_of_nothing_is_refused() -> None:
    with pytest.raises(DeliberateError, match="0 probabilities"):
        reliability([], [])
