"""Optimal stopping, the comparison rules, and their cost at equal risk."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_recordings import synthetic_recording

from deliberate.calibration.baselines import (
    Rule,
    optimal_stopping,
    usual_rules,
)
from deliberate.calibration.calibration import fit_calibrators
from deliberate.calibration.comparison import (
    compare_rules,
    lower_hull,
    published_point,
    useful_risks,
)
from deliberate.calibration.exit_traces import replay
from deliberate.calibration.stopping_policy import (
    PolicyTable,
    StepCosts,
    backward_induction,
    best_threshold,
    fit_policy,
)
from deliberate.engine.exit_rules import published_thresholds
from deliberate.utils.errors import DeliberateError

COSTS = StepCosts(2.0, (2.0, 2.0, 2.0), "layers")


@pytest.fixture(scope="module")
def fitted():
    recording = synthetic_recording(400, seed=5)
    calibrators = fit_calibrators(recording)
    return recording, calibrators, fit_policy(recording, calibrators, COSTS)


samples = st.lists(
    st.tuples(st.sampled_from([0.1, 0.4, 0.4, 0.8, 1.0]), st.integers(0, 5), st.integers(0, 5)),
    min_size=1,
    max_size=30,
)


@given(samples)
def test_the_best_threshold_is_best_among_all(sample) -> None:
    scores = np.array([s for s, _, _ in sample])
    leave, stay = (np.array([row[i] for row in sample], dtype=float) for i in (1, 2))

    def total(t):
        return np.where(scores >= t, leave, stay).sum()

    every = [*np.unique(scores), math.inf]
    least = min(total(t) for t in every)
    assert total(best_threshold(scores, leave, stay)) == least


@pytest.mark.parametrize("lambda_", [10.0, 17.0, 52.0, 94.0])
def test_on_a_chain_with_known_transitions_stopping_is_the_exact_dynamic_programme(lambda_) -> None:
    """Three levels of p at each of three exits; the next level depends on this one alone."""
    random = np.random.default_rng(0)
    levels = np.array([[0.5, 0.7, 0.9], [0.6, 0.85, 0.97], [0.8, 0.93, 0.99]])
    move = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.05, 0.15, 0.8]])
    onward = (2.0, 1.0, 3.0)
    state = random.integers(0, 3, 60_000)
    columns = [levels[0][state]]
    for k in (1, 2):
        state = (random.random(len(state))[:, None] > np.cumsum(move, axis=1)[state]).sum(axis=1)
        columns.append(levels[k][state])
    value = np.zeros(3)
    expected = []
    for k in (2, 1, 0):
        leave = lambda_ * (1 - levels[k])
        stay = onward[k] + (move @ value if k < 2 else 0.0)
        stops = leave <= stay
        expected.append(levels[k][stops].min() if stops.any() else math.inf)
        value = np.minimum(leave, stay)
    found = backward_induction(np.stack(columns, axis=1), onward, lambda_)
    wanted = tuple(0.0 if level == levels[k].min() else level
                   for k, level in zip((2, 1, 0), expected, strict=True))[::-1]  # fmt: skip
    assert found == wanted


def test_with_one_exit_it_is_the_break_even_probability() -> None:
    p = np.linspace(0.5, 1.0, 501)[:, None]
    (level,) = backward_induction(p, (3.0,), lambda_=20.0)
    assert level == pytest.approx(1 - 3.0 / 20.0, abs=2e-3)


def test_dearer_disagreements_never_lower_a_threshold_and_end_at_dense(fitted) -> None:
    recording, _, table = fitted
    assert list(table.lambdas) == sorted(table.lambdas) and math.isinf(table.lambdas[-1])
    rows = np.array(table.rows)
    assert (rows[1:] >= rows[:-1]).all()
    assert table.rows[0] == (0.0, 0.0, 0.0) and table.rows[-1] == (math.inf,) * 3
    assert table.shares[0] == (1.0, 0.0, 0.0, 0.0) and table.shares[-1] == (0.0, 0.0, 0.0, 1.0)
    assert table.costs()[0] == 2.0 and table.costs()[-1] == 8.0
    for lambda_ in (0.0, 3.0, 40.0, 1e12):
        found = replay(recording, table.thresholds(lambda_))
        place = table.rows.index(table.thresholds(lambda_))
        assert found.seconds(2.0, COSTS.onward).mean() == pytest.approx(table.costs()[place])


def test_a_price_between_two_of_the_table_gets_the_more_careful_row(fitted) -> None:
    *_, table = fitted
    for before, after in itertools.pairwise(table.lambdas[:-1]):
        middle = (before + after) / 2
        assert table.thresholds(middle) == table.thresholds(after)
        assert table.thresholds(before) != table.thresholds(after)
    with pytest.raises(DeliberateError, match="lambda -1"):
        table.thresholds(-1.0)
    with pytest.raises(DeliberateError, match="lambda nan"):
        table.thresholds(math.nan)


def test_expected_disagreement_is_what_fresh_tokens_show(fitted) -> None:
    *_, table = fitted
    fresh = synthetic_recording(2000, seed=6)
    for lambda_ in (5.0, 20.0, 80.0):
        place = table.rows.index(table.thresholds(lambda_))
        assert replay(fresh, table.rows[place]).risk == pytest.approx(table.risks[place], abs=0.01)
    wanted = 0.05
    lambda_ = table.lambda_for_risk(wanted)
    place = table.lambdas.index(lambda_)
    assert max(table.risks[place:]) <= wanted < table.risks[place - 1]


def test_an_exit_that_pays_neither_at_a_price_nor_at_a_dearer_one_is_not_evaluated(fitted) -> None:
    recording, calibrators, plain = fitted
    requested = []

    def pays(rates):
        requested.append(rates)
        return [rates[0] >= 0.3, rates[1] >= 0.1, False]

    table = fit_policy(recording, calibrators, COSTS, pays=pays)
    assert all(0 <= rate <= 1 for rates in requested for rate in rates)
    assert {row[2] for row in table.rows} == {math.inf} and {s[2] for s in table.shares} == {0.0}
    assert table.rows[0][:2] == plain.rows[0][:2], "though no token gets to the second one there"
    for lambda_ in table.lambdas[:-1]:
        for k in (0, 1):
            if table.thresholds(lambda_)[k] < math.inf:
                assert table.thresholds(lambda_)[k] == plain.thresholds(lambda_)[k]
    strict = [row for row in plain.rows[:-1] if min(row[:2]) < math.inf]
    assert len(table.rows) < len(strict), "at the dearest prices too few tokens exit"


def test_where_no_exit_pays_full_depth_is_the_only_policy(fitted) -> None:
    never = lambda rates: [False] * len(rates)  # noqa: E731
    table = fit_policy(*fitted[:2], COSTS, pays=never)
    assert table.lambdas == (math.inf,) and table.rows == ((math.inf,) * 3,)
    assert table.risks == (0.0,) and table.shares == ((0.0, 0.0, 0.0, 1.0),)
    assert PolicyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_a_slower_deep_part_is_left_more_often(fitted) -> None:
    recording, calibrators, table = fitted
    slow = fit_policy(recording, calibrators, StepCosts(2.0, (2.0, 2.0, 9.0), "layers"))
    at = 40.0
    kept = replay(recording, table.thresholds(at)).counts[-1]
    assert replay(recording, slow.thresholds(at)).counts[-1] < kept
    elsewhere = StepCosts(1.0, (1.0, 1.0, 1.0))
    assert table.costs(elsewhere) == pytest.approx([c / 2 for c in table.costs()])


def test_a_table_survives_json_and_its_hash_follows_its_thresholds(fitted) -> None:
    *_, table = fitted
    text = json.dumps(table.to_dict(), allow_nan=False)
    loaded = PolicyTable.from_dict(json.loads(text))
    assert loaded == table and loaded.sha256 == table.sha256
    rows = [list(row) for row in table.rows]
    rows[0][2] -= 1e-6
    other = replace(table, rows=tuple(map(tuple, rows)))
    assert other.sha256 != table.sha256


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {"lambdas": t.lambdas[:-1]}, "one row, risk and share per lambda"),
        (lambda t: {"lambdas": t.lambdas[::-1]}, "lambdas must rise"),
        (lambda t: {"rows": t.rows[::-1]}, "must not fall"),
        (lambda t: {"rows": tuple(row[:2] for row in t.rows)}, "3 exits need rows of 3"),
    ],
)
def test_a_damaged_table_is_refused(fitted, change, named) -> None:
    *_, table = fitted
    with pytest.raises(DeliberateError, match=named):
        replace(table, **change(table))


@pytest.mark.parametrize(
    "costs", [(1.0, ()), (-1.0, (1.0,)), (1.0, (math.nan,)), (1.0, (0.0, 0.0))]
)
def test_impossible_costs_are_refused(costs) -> None:
    with pytest.raises(DeliberateError, match="cost"):
        StepCosts(*costs)


def test_a_policy_needs_tokens_and_a_calibrator_and_cost_per_exit(fitted) -> None:
    recording, calibrators, _ = fitted
    with pytest.raises(DeliberateError, match="2 calibrators for 3 exits"):
        fit_policy(recording, calibrators[:2], COSTS)
    with pytest.raises(DeliberateError, match="1 costs for 3 exits"):
        fit_policy(recording, calibrators, StepCosts(1.0, (1.0,)))
    with pytest.raises(DeliberateError, match="recording is empty"):
        fit_policy(recording.select([]), calibrators, COSTS)


# -- the usual rules -----------------------------------------------------------------------------


def rule(name: str, recording) -> Rule:
    return next(r for r in usual_rules(recording) if r.name == name)


def test_every_rule_leaves_each_token_exactly_once() -> None:
    recording = synthetic_recording(6, 6)
    recording = replace(recording, others={"entropy": recording.scores})
    rules = usual_rules(recording)
    assert len(rules) == 7
    for each in rules:
        for setting in each.settings:
            exits_at = each.exit_probabilities(recording, setting)
            assert exits_at.shape == (36, 4) and (exits_at >= 0).all()
            np.testing.assert_allclose(exits_at.sum(axis=1), 1.0)


def test_patience_counts_exits_in_a_row_that_choose_one_token() -> None:
    recording = replace(
        synthetic_recording(1, 4),
        tokens=np.array([[1, 1, 1], [1, 2, 2], [1, 2, 3], [1, 1, 2]], dtype=np.int32),
    )
    patience = rule("patience", recording)
    exits = {
        n: patience.exit_probabilities(recording, n).argmax(axis=1).tolist() for n in (1, 2, 3, 4)
    }
    assert exits == {1: [0] * 4, 2: [1, 2, 3, 1], 3: [2, 3, 3, 3], 4: [3] * 4}
    deep = synthetic_recording(1, 1, slopes=(1.0,) * 4, offsets=(1.0,) * 4)
    deep = replace(deep, tokens=np.array([[1, 1, 2, 2]], dtype=np.int32))
    assert (
        rule("patience", deep).exit_probabilities(deep, 3).argmax() == 4
    )  # a break starts a new count


def test_the_decaying_threshold_is_calms() -> None:
    recording = synthetic_recording(3, 8)
    exits_at = rule("decaying (CALM)", recording).exit_probabilities(recording, 0.3)
    for t in range(len(recording)):
        level = 0.9 * 0.7 + 0.1 * math.exp(-4 * recording.position[t] / 8)
        left = next((k for k in range(3) if recording.scores[t, k] >= level), 3)
        assert exits_at[t, left] == 1


def test_published_thresholds_are_one_setting_of_the_rising_family() -> None:
    assert published_thresholds(3) == pytest.approx((0.85, 0.90, 0.95))
    recording = synthetic_recording(50, 20)
    found = replay(recording, published_thresholds(3))
    np.testing.assert_array_equal(
        rule("rising with depth", recording).exit_probabilities(recording, 0.15).argmax(axis=1),
        found.exits,
    )
    risk, cost = published_point(recording, COSTS)
    assert risk == pytest.approx(found.risk)
    assert cost == pytest.approx(found.seconds(2.0, COSTS.onward).mean())


def test_random_exits_cost_and_err_as_their_probabilities_say() -> None:
    recording = synthetic_recording(20, 20)
    exits_at = rule("random exits", recording).exit_probabilities(recording, 0.5)
    np.testing.assert_allclose(exits_at, np.tile([0.5, 0.25, 0.125, 0.125], (400, 1)))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=25))
def test_the_hull_lies_below_every_point_and_is_convex(points) -> None:
    risk, cost = (np.array([p[i] for p in points], dtype=float) for i in (0, 1))
    hull = lower_hull(risk, cost)
    assert (np.diff(risk[hull]) > 0).all() and (np.diff(cost[hull]) < 0).all()
    slopes = np.diff(cost[hull]) / np.diff(risk[hull])
    assert (np.diff(slopes) > 0).all()
    assert (np.interp(risk, risk[hull], cost[hull]) <= cost + 1e-9).all()


def test_at_equal_risk_optimal_stopping_is_never_dearer_beyond_noise(fitted) -> None:
    recording, _, table = fitted
    fresh = synthetic_recording(400, seed=7)
    rules = [optimal_stopping(table), *usual_rules(fresh)]
    rows = compare_rules(rules, recording, fresh, COSTS, risks=(0.02, 0.05, 0.1), resamples=100)
    assert [row.rule for row in rows[::3]] == [each.name for each in rules]
    for row in rows:
        assert row.ratio_interval[1] >= 1.0, row
        assert row.interval[0] <= row.cost <= row.interval[1]
        if row.rule in ("random exits", "fixed depth", "rising with depth"):
            assert row.ratio_interval[0] > 1.0, row  # and these are clearly beaten
        if row.rule == "optimal stopping":
            assert row.ratio_interval == (1.0, 1.0)


def test_risks_too_small_to_see_or_too_large_to_matter_are_left_out() -> None:
    recording = synthetic_recording(100, 20)
    most = 1 - recording.agrees[:, 0].mean()
    assert useful_risks(recording, [1e-4, 0.0025, 0.01, most + 0.01]) == [0.0025, 0.01]


def test_comparing_on_nothing_or_at_impossible_risks_is_refused(fitted) -> None:
    recording, _, table = fitted
    rules = [optimal_stopping(table)]
    with pytest.raises(DeliberateError, match="held-out recording is empty"):
        compare_rules(rules, recording, recording.select([]), COSTS)
    with pytest.raises(DeliberateError, match=r"must lie in \(0, 1\)"):
        compare_rules(rules, recording, recording, COSTS, risks=(0.0,))


def test_a_threshold_that_saves_nothing_is_not_taken() -> None:
    scores = np.array([0.9, 0.8])
    assert best_threshold(scores, np.ones(2), np.ones(2)) == math.inf
    assert best_threshold(scores, np.ones(2), np.array([1.5, 1.0])) == 0.9
