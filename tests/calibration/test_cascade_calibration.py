"""When a small model's answer may stand: losses, the certificate, budgets, files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deliberate.calibration.cascade import (
    THRESHOLDS,
    CascadeCalibration,
    CascadeRecord,
    answer_confidence,
    cascade_losses,
    fit_cascade,
    handed_over,
)
from deliberate.utils.errors import DeliberateError


def drawn(seed: int, count: int, useful: bool = True) -> CascadeRecord:
    """Answers of which the small model's are right as often as it says, the large one's at 95 %."""
    dice = np.random.default_rng(seed)
    confidence = dice.beta(4, 1, count)
    small = dice.random(count) < (confidence if useful else 0.7)
    return CascadeRecord(confidence, small, dice.random(count) < 0.95)


def fitted(seed: int = 0, tests: int = 2000, epsilon: float = 0.05, **given):
    names = {"small": "a" * 64, "large": "b" * 64, "max_new_tokens": 8} | given
    return fit_cascade(
        drawn(seed, 600), drawn(seed + 1000, tests), measure="least", epsilon=epsilon, delta=0.1,
        **names,
    )  # fmt: skip


def test_confidence_is_that_of_the_least_likely_token_or_the_mean_one() -> None:
    logs = [math.log(0.9), math.log(0.4), math.log(0.9)]
    assert answer_confidence(logs, "least") == pytest.approx(0.4)
    assert answer_confidence(logs, "mean") == pytest.approx((0.9 * 0.4 * 0.9) ** (1 / 3))
    assert answer_confidence([], "least") == 0.0
    with pytest.raises(DeliberateError, match="measure"):
        answer_confidence(logs, "most")


def test_only_what_the_large_model_would_have_solved_is_lost() -> None:
    made, _ = fitted()
    record = CascadeRecord(
        np.array([0.99, 0.99, 0.99, 0.01]),
        np.array([True, False, False, False]),
        np.array([True, True, False, True]),
    )
    assert list(cascade_losses(made.calibrator, record, 0.5)) == [0, 1, 0, 0]
    assert handed_over(made.calibrator, record.confidence, 0.5) == 0.25
    assert not cascade_losses(made.calibrator, record, math.inf).any()


def test_the_certificate_holds_on_fresh_answers_as_often_as_it_says() -> None:
    violated = 0
    for seed in range(40):
        made, tests = fitted(seed, tests=400)
        assert tests.certified is not None and made.threshold == tests.certified.lambda_
        fresh = drawn(77_777 + seed, 40_000)
        violated += cascade_losses(made.calibrator, fresh, made.threshold).mean() > made.epsilon
    assert violated <= 8  # delta of 40 is 4; more than twice that has a chance of 1 in 100


def test_a_confidence_that_says_nothing_certifies_nothing() -> None:
    made, tests = fit_cascade(
        drawn(0, 400, useful=False), drawn(1, 400, useful=False), measure="mean", epsilon=0.02,
        delta=0.1, small="a", large="b", max_new_tokens=8,
    )  # fmt: skip
    # Above every probability that such a curve gives nothing is taken, and nothing lost.
    taken = 1 - handed_over(made.calibrator, drawn(2, 400).confidence, made.threshold)
    assert tests.certified is None or taken < 0.05


def test_a_mean_time_moves_the_threshold_as_far_as_it_must() -> None:
    made, _ = fitted()
    threshold = made.threshold_within(0.6, 0.2, 1.0)
    place = THRESHOLDS.index(threshold)
    assert 0.2 + made.shares[place] * 1.0 <= 0.6
    assert place == 0 or 0.2 + made.shares[place - 1] * 1.0 > 0.6
    assert made.threshold_within(2.0, 0.2, 1.0) == THRESHOLDS[0]
    with pytest.raises(DeliberateError, match="the small model alone takes 200 ms"):
        made.threshold_within(0.1, 0.2, 1.0)


def test_a_file_comes_back_and_an_edited_one_is_refused(tmp_path) -> None:
    made, _ = fitted()
    path = tmp_path / "cascade.json"
    made.save(path)
    assert CascadeCalibration.load(path) == made
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"epsilon": 0.001}))
    with pytest.raises(DeliberateError, match="calibrate again"):
        CascadeCalibration.load(path)
    path.write_text(json.dumps(raw | {"odd": 1}))
    with pytest.raises(DeliberateError, match="odd"):
        CascadeCalibration.load(path)


def test_other_weights_are_refused_by_name() -> None:
    made, _ = fitted()
    made.check_models("a" * 64, "b" * 64)
    with pytest.raises(DeliberateError, match="another large model"):
        made.check_models("a" * 64, "c" * 64)


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_alike_fit_nothing(right) -> None:
    alike = CascadeRecord([0.5, 0.6], [right, right], [True, True])
    with pytest.raises(DeliberateError, match="every one of 2 small answers"):
        fit_cascade(
            alike, alike, measure="least", epsilon=0.1, delta=0.1, small="a", large="b",
            max_new_tokens=8,
        )  # fmt: skip
