"""Certificates and the drift monitor."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom
from synthetic_recordings import synthetic_recording

from deliberate.calibration.certificate import (
    Certificate,
    Risk,
    accuracy_losses,
    binomial_p_value,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    problems_needed,
    risk_p_value,
    token_losses,
    upper_bound,
)
from deliberate.calibration.exit_traces import replay
from deliberate.policies.drift import DriftMonitor
from deliberate.utils.errors import DeliberateError

EPSILON, DELTA = 0.05, 0.1
RESAMPLES = 1000
# Above this many violations in 1,000 a true rate of delta is implausible (p < 0.001).
MOST_VIOLATIONS = int(binom.ppf(0.999, RESAMPLES, DELTA))


def test_p_values_are_what_their_formulas_say() -> None:
    assert binomial_p_value(0, 299, 0.01) == pytest.approx(0.99**299)
    assert binomial_p_value(3, 100, 0.05) == pytest.approx(binom.cdf(3, 100, 0.05))
    assert hoeffding_bentkus_p_value(0.0, 299, 0.01) == pytest.approx(0.99**299)
    assert hoeffding_bentkus_p_value(0.2, 50, 0.1) == 1.0
    by_hand = math.exp(-100 * (0.02 * math.log(0.02 / 0.1) + 0.98 * math.log(0.98 / 0.9)))
    assert hoeffding_bentkus_p_value(0.02, 100, 0.1) == pytest.approx(
        min(by_hand, math.e * binom.cdf(2, 100, 0.1))
    )


@pytest.mark.parametrize("kind", list(Risk))
def test_p_values_are_valid_at_the_edge_of_the_hypothesis(kind) -> None:
    """With the risk exactly epsilon, P(p <= u) is at most u."""
    random = np.random.default_rng(0)
    draws = (
        (random.random((4000, 80)) < EPSILON).astype(float)
        if kind is Risk.ACCURACY
        else random.beta(0.5, 0.5 / EPSILON - 0.5, (4000, 80))
    )
    p = np.array([risk_p_value(row, EPSILON, kind) for row in draws])
    for u in (0.01, 0.05, 0.1, 0.3):
        assert (p <= u).sum() <= binom.ppf(0.999, len(p), u)


def population(kind: Risk, sizes: np.ndarray, problems: int, random) -> np.ndarray:
    """Losses ``[price, problem]`` with the true risks `sizes`."""
    shape = (len(sizes), problems)
    if kind is Risk.ACCURACY:
        return (random.random(shape) < sizes[:, None]).astype(float)
    return random.beta(0.3, 0.3 / sizes[:, None] - 0.3, shape)


@pytest.mark.parametrize("kind", list(Risk))
def test_of_a_thousand_calibrations_at_most_a_share_delta_certifies_too_much(kind) -> None:
    """And the naive rule, the cheapest price that passes on its own, breaks the promise.

    Prices fall from the most careful to the cheapest. Their true risks rise to just below epsilon,
    then stay just above it: the case in which a lucky pass is likeliest.
    """
    random = np.random.default_rng(1)
    sizes = np.concatenate([np.linspace(0.1, 0.95, 6), np.full(20, 1.02)]) * EPSILON
    lambdas = [float(len(sizes) - i) for i in range(len(sizes))]
    certified, violated, naive_violated = 0, 0, 0
    for _ in range(RESAMPLES):
        losses = population(kind, sizes, 150, random)
        by_price = dict(zip(lambdas, losses, strict=True))
        testing = fixed_sequence(lambdas, by_price.__getitem__, kind, epsilon=EPSILON, delta=DELTA)
        if testing.certified is not None:
            certified += 1
            violated += sizes[lambdas.index(testing.certified.lambda_)] > EPSILON
        passing = [i for i, row in enumerate(losses) if risk_p_value(row, EPSILON, kind) <= DELTA]
        naive_violated += bool(passing) and sizes[passing[-1]] > EPSILON
    assert certified > RESAMPLES / 2  # the promise is not kept by never certifying
    assert violated <= MOST_VIOLATIONS
    if kind is Risk.ACCURACY:  # Hoeffding and Bentkus leave luck no room at this size
        assert naive_violated > MOST_VIOLATIONS


def test_the_promise_holds_for_policies_on_recorded_traces() -> None:
    """The whole path: one recording is the population, calibration sets are drawn from it."""
    random = np.random.default_rng(2)
    whole = synthetic_recording(3000, 10, seed=3)
    lambdas = [float(p) for p in np.linspace(0.99, 0.3, 70)]
    losses = {lambda_: token_losses(whole, [lambda_] * 3) for lambda_ in lambdas}
    truth = {lambda_: losses[lambda_].mean() for lambda_ in lambdas}
    violated = cheap = 0
    for _ in range(RESAMPLES):
        picks = random.integers(0, 3000, 400)
        testing = fixed_sequence(
            lambdas, lambda p, rows=picks: losses[p][rows], Risk.TOKEN, epsilon=EPSILON, delta=DELTA
        )
        found = testing.certified
        violated += found is not None and truth[found.lambda_] > EPSILON
        naive = [p for p in lambdas if losses[p][picks].mean() <= EPSILON]
        cheap += truth[naive[-1]] > EPSILON
    assert violated <= MOST_VIOLATIONS
    assert cheap > MOST_VIOLATIONS  # "the sample's risk is below epsilon" is no certificate


def test_testing_goes_from_the_most_careful_price_on_and_stops_at_the_first_failure() -> None:
    requested = []

    def losses(lambda_):
        requested.append(lambda_)
        return np.concatenate([np.ones({5: 0, 4: 1, 3: 40, 2: 0, 1: 0}[lambda_]), np.zeros(400)])

    testing = fixed_sequence(
        [2.0, 5.0, 1.0, 3.0, 4.0, math.inf], losses, Risk.ACCURACY, epsilon=0.05, delta=0.05
    )
    assert requested == [5.0, 4.0, 3.0]
    assert [test.rejected for test in testing.tests] == [True, True, False]
    assert testing.certified.lambda_ == 4.0 and testing.certified.n == 401


def test_without_a_certificate_the_number_of_problems_needed_is_said() -> None:
    testing = fixed_sequence(
        [1.0], lambda _: np.zeros(100), Risk.ACCURACY, epsilon=0.01, delta=0.05
    )
    assert testing.certified is None
    assert "about 299 problems" in testing.refusal() and "\n" not in testing.refusal()
    bad = fixed_sequence([1.0], lambda _: np.ones(50), Risk.ACCURACY, epsilon=0.01, delta=0.05)
    assert "more problems would not help" in bad.refusal()


@pytest.mark.parametrize("rate", [0.0, 0.002, 0.005])
def test_the_number_needed_is_enough_and_about_least(rate) -> None:
    n = problems_needed(0.01, 0.05, rate)
    assert binomial_p_value(math.ceil(rate * n - 1e-9), n, 0.01) <= 0.05
    fewer = int(0.9 * n)
    assert binomial_p_value(math.ceil(rate * fewer), fewer, 0.01) > 0.05


def test_token_losses_are_shares_of_each_answer() -> None:
    recording = synthetic_recording(5, 7, seed=4)
    found = token_losses(recording, [0.6] * 3)
    wrong = ~replay(recording, [0.6] * 3).agrees
    assert found.tolist() == [wrong[7 * i : 7 * i + 7].mean() for i in range(5)]


def test_accuracy_loss_counts_what_dense_solved_and_the_policy_did_not() -> None:
    assert accuracy_losses([1, 1, 0, 0], [1, 0, 1, 0]).tolist() == [0, 1, 0, 0]


def test_the_upper_bound_covers_the_mean() -> None:
    random = np.random.default_rng(0)
    draws = random.beta(0.3, 5.7, (400, 100))
    bounds = np.array([upper_bound(row, 0.1) for row in draws])
    assert (bounds < 0.05).sum() <= binom.ppf(0.999, 400, 0.1)
    assert (bounds > draws.mean(axis=1)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan, "x", True])
def test_epsilon_and_delta_lie_in_the_open_unit_interval(value) -> None:
    for guarantee in ({"epsilon": value, "delta": 0.05}, {"epsilon": 0.01, "delta": value}):
        with pytest.raises(DeliberateError, match=r"must lie in \(0, 1\)"):
            fixed_sequence([1.0], lambda _: np.zeros(9), Risk.TOKEN, **guarantee)


@pytest.mark.parametrize(
    ("losses", "named"),
    [([], "at least one problem"), ([0.5, 1.5], "in \\[0, 1\\]"), ([0.0, 0.5], "0 or 1")],
)
def test_losses_that_cannot_be_are_refused(losses, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        fixed_sequence([1.0], lambda _: losses, Risk.ACCURACY, epsilon=0.1, delta=0.1)


@pytest.fixture
def certificate() -> Certificate:
    return Certificate(
        risk=Risk.TOKEN,
        epsilon=0.01,
        delta=0.05,
        n=500,
        observed=0.002,
        lambda_=3.5,
        thresholds=(0.9, math.inf),
        disagreement=0.01,
        weights="a" * 64,
        exits="b" * 64,
        policy="c" * 64,
        data="d" * 64,
        conditions={"task": "words"},
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.mark.parametrize("part", ["weights", "exits", "policy", "data"])
def test_a_certificate_of_something_else_is_refused_by_name(certificate, part) -> None:
    certificate.check(**{part: getattr(certificate, part)})
    with pytest.raises(DeliberateError, match=f"for other {part}"):
        certificate.check(**{part: "e" * 64})


def test_conditions_that_differ_are_refused_by_name(certificate) -> None:
    certificate.check(conditions={"task": "words", "unstated": 1})
    with pytest.raises(DeliberateError, match="for task='words', not 'gsm8k'"):
        certificate.check(conditions={"task": "gsm8k"})


def test_a_certificate_survives_its_file_and_a_damaged_file_is_one_line(
    certificate, tmp_path
) -> None:
    path = tmp_path / "c.json"
    certificate.save(path)
    assert Certificate.load(path) == certificate
    raw = json.loads(path.read_text())
    for change, named in (
        (lambda r: r.pop("epsilon"), "lacks 'epsilon'"),
        (lambda r: r.update(extra=1), "unknown key 'extra'"),
        (lambda r: r.update(epsilon=2.0), "epsilon=2.0"),
        (lambda r: r.update(risk="luck"), "risk 'luck' is unknown"),
    ):
        damaged = dict(raw)
        change(damaged)
        path.write_text(json.dumps(damaged))
        with pytest.raises(DeliberateError, match=named):
            Certificate.load(path)
    path.write_text("{")
    with pytest.raises(DeliberateError, match="not valid JSON"):
        Certificate.load(path)
    with pytest.raises(DeliberateError, match="cannot be read"):
        Certificate.load(tmp_path / "gone.json")


# -- drift -----------------------------------------------------------------------------------------


def first_alarm(monitor: DriftMonitor, wrong: np.ndarray, tokens: int) -> int:
    for index, count in enumerate(wrong):
        if monitor.update(int(count), tokens).alarm:
            return index + 1
    return len(wrong) + 1


def test_false_alarms_are_rarer_than_one_in_run_length_answers() -> None:
    random = np.random.default_rng(0)
    run_length, streams = 200, 300
    # answers that differ a lot, with the mean exactly at the limit
    rates = random.beta(0.5, 9.5, (streams, 1000))
    wrong = random.binomial(40, rates)
    waits = [first_alarm(DriftMonitor(0.05, run_length), row, 40) for row in wrong]
    # waits are cut at 1,001, so their mean is an underestimate
    assert np.mean(waits) >= run_length


@pytest.mark.parametrize("good", [0, 3000])
def test_a_change_is_noticed_soon_however_long_the_good_past(good) -> None:
    random = np.random.default_rng(1)
    monitor = DriftMonitor(0.01, 10_000)
    assert first_alarm(monitor, random.binomial(70, 0.004, good), 70) == good + 1
    wait = first_alarm(monitor, random.binomial(70, 0.05, 500), 70)
    assert wait <= 60
    monitor.reset()
    assert not monitor.state.alarm and monitor.state.answers == 0


def test_the_monitor_watches_the_certificates_own_limit(certificate) -> None:
    monitor = DriftMonitor.for_certificate(replace(certificate, disagreement=0.02))
    assert monitor.limit == 0.02
    state = monitor.update(1, 50)
    assert (state.answers, state.tokens, state.disagreements) == (1, 50, 1)
    assert monitor.update(0, 0).answers == 1  # nothing verified, nothing learnt


def test_the_alarm_stays_until_it_is_reset() -> None:
    monitor = DriftMonitor(0.05, 20)
    assert first_alarm(monitor, np.full(100, 10), 10) <= 10
    for _ in range(500):
        assert monitor.update(0, 10).alarm


@pytest.mark.parametrize("counts", [(3, 2), (-1, 5), (1, 0)])
def test_impossible_counts_are_refused(counts) -> None:
    with pytest.raises(DeliberateError, match="disagreements in"):
        DriftMonitor(0.1).update(*counts)


@pytest.mark.parametrize(
    ("settings", "named"),
    [((0.0,), "limit"), ((1.0,), "limit"), ((math.nan,), "limit"), ((0.1, 1.0), "run_length")],
)
def test_impossible_monitors_are_refused(settings, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        DriftMonitor(*settings)


def test_the_alarm_is_raised_by_the_first_answer_whose_evidence_reaches_the_run_length() -> None:
    monitor = DriftMonitor(0.01, run_length=50)
    while not monitor.alarm:
        before = monitor.evidence
        monitor.update(1, 20)
    assert before < 50 <= monitor.evidence


def test_a_lambda_passes_exactly_from_the_p_value_delta_down() -> None:
    # Without a loss in n problems p = (1 - epsilon) ** n: 0.9 ** 28 > 0.05 >= 0.9 ** 29.
    for problems, passes in ((28, False), (29, True)):
        losses = np.zeros(problems)
        testing = fixed_sequence(
            [1.0], lambda _, losses=losses: losses, Risk.ACCURACY, epsilon=0.1, delta=0.05
        )
        assert (testing.certified is not None) is passes
