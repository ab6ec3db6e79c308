"""The gate under the price: its costs are measured and predicted, its band follows the price."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gate_cases import BAND, decode, gated_model, rounds, tokens
from hypothesis import given
from hypothesis import strategies as st
from synthetic_recordings import synthetic_recording
from tiny_calibration import tiny_calibration, tiny_cost
from tiny_models import left_padded

from deliberate.calibration.calibration import Calibration, fit_calibration
from deliberate.calibration.certificate import Certificate
from deliberate.calibration.gate_threshold import (
    LEAST_UNCERTAIN_TOKENS,
    GateRounds,
    best_gate_threshold,
)
from deliberate.calibration.gate_traces import TRIED, record_rounds
from deliberate.calibration.stopping_policy import PolicyTable, StepCosts
from deliberate.cost.cache import fingerprint
from deliberate.cost.gate import measure_rounds
from deliberate.cost.grid import Grid
from deliberate.cost.measure import measure
from deliberate.cost.meter import Work, WorkMeter, predict_seconds
from deliberate.cost.model import CostModel
from deliberate.cost.parts import DeliberationCost, PassCost
from deliberate.engine.exit_policy import ExitPolicy, FixedPolicy
from deliberate.modeling.deliberation_gate import run_rounds
from deliberate.policies.exit_policies import BudgetPolicy
from deliberate.utils.errors import DeliberateError

COST = DeliberationCost(0.5e-3, PassCost(1e-3, per_row=1e-3))
SMALL = Grid(tokens=(1, 3), contexts=(8, 16), batches=(1, 2), prompts=(4, 8), steps=12, rounds=2)


def gate_rounds_for_test(size: int = 4000, seed: int = 0) -> GateRounds:
    """Rounds help where the top is unsure, and do a little harm where it is sure."""
    random = np.random.default_rng(seed)
    probability = random.uniform(0.2, 1.0, size).astype(np.float32)
    gain, harm = 0.4 * (1 - probability), np.full(size, 0.05)
    drawn = random.uniform(size=size)
    helped = np.where(drawn < gain, 1, np.where(drawn < gain + harm, -1, 0)).astype(np.int8)
    return GateRounds(probability, helped, rounds=1)


# -- the band --------------------------------------------------------------------------------------


def test_the_band_that_pays_most_at_a_price_is_chosen():
    p = np.array([0.9, 0.2, 0.5, 0.5, 0.7])
    helped = np.array([1.0, 1.0, 1.0, -1.0, 0.0])

    def worth(gate_threshold, lambda_):
        deliberation = p < gate_threshold
        return float((lambda_ * helped[deliberation] - 1.0).sum())

    gate_thresholds = [0.0, *np.nextafter(np.unique(p), 2)]
    for lambda_ in (0.0, 0.5, 1.5, 3.0, 10.0):
        gate_threshold = best_gate_threshold(p, helped, round_seconds=1.0, lambda_=lambda_)
        assert worth(gate_threshold, lambda_) == max(
            worth(other, lambda_) for other in gate_thresholds
        )
    assert best_gate_threshold(p, helped, round_seconds=1.0, lambda_=0.5) == 0.0
    assert best_gate_threshold(p[:0], helped[:0], round_seconds=1.0, lambda_=9.0) == 0.0
    for wrong in ({"lambda_": -1.0}, {"round_seconds": -1.0}):
        with pytest.raises(DeliberateError, match="at least 0"):
            best_gate_threshold(p, helped, **{"round_seconds": 1.0, "lambda_": 1.0} | wrong)


def test_at_an_infinite_price_only_right_tokens_count_and_then_fewer_rounds():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    helped = np.array([1, 1, 0, -1])
    gate_threshold = best_gate_threshold(p, helped, round_seconds=5.0, lambda_=math.inf)
    assert 0.2 < gate_threshold <= 0.3


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(-1, 1)), min_size=1, max_size=30))
def test_a_dearer_wrong_token_never_narrows_the_band(tokens_):
    p, helped = (np.array(column) for column in zip(*tokens_, strict=True))
    made = GateRounds(p, helped)
    gate_thresholds = [
        made.gate_threshold(lambda_, 1.0) for lambda_ in (0.0, 0.7, 1.0, 1.9, 3.0, 20.0, math.inf)
    ]
    assert gate_thresholds == sorted(gate_thresholds) and gate_thresholds[0] == 0.0


def test_tokens_that_were_never_tried_bound_the_band():
    made = GateRounds(np.array([0.3, 0.5, 0.9]), np.array([1, 1, 0]), tried=0.8)
    assert made.uncertain_tokens == 2 and made.gate_threshold(math.inf, 1.0) <= 0.8
    assert made.rounds_per_token(0.6) == pytest.approx(2 / 3)
    with pytest.raises(DeliberateError, match="one of each"):
        GateRounds(np.zeros(3), np.zeros(2))


def test_what_is_recorded_of_a_text_is_what_the_rounds_do_to_it():
    model = gated_model(rounds=2)
    ids = torch.randint(0, 97, (1, 15), generator=torch.Generator().manual_seed(1))
    made = record_rounds(model, [ids[0].tolist(), ids[0, :9].tolist()], [4, 4])
    with torch.inference_mode():
        last = model(ids, output_exit_states=True).last
        wanted = torch.zeros(1, 15, dtype=torch.bool)
        wanted[0, 3:14] = True
        logits = model.backbone.logits
        before = logits(last[wanted])
        after = logits(run_rounds(model.gate, last, wanted, logits, think_below=2.0).states[-1])
        right = ids[0, 4:]
        helped = (after.argmax(-1) == right).int() - (before.argmax(-1) == right).int()
        sure = before.softmax(-1).amax(-1)
    order = np.lexsort((made.helped, made.probability))
    expected = torch.cat((sure, sure[:5])).numpy(), torch.cat((helped, helped[:5])).numpy()
    other = np.lexsort((expected[1], expected[0].astype(np.float32)))
    np.testing.assert_allclose(made.probability[order], expected[0][other], rtol=1e-5)
    assert made.helped[order].tolist() == expected[1][other].tolist()
    assert (made.rounds, made.tried) == (2, TRIED)
    model.gate = None
    with pytest.raises(DeliberateError, match="no deliberation gate"):
        record_rounds(model, [[1, 2]], [1])


# -- the table -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> PolicyTable:
    recording = synthetic_recording(60, slopes=(1.5, 2.0), offsets=(0.5, 1.5))
    steps = StepCosts(1.0, (1.0, 1.0), "layers", round=1.0)
    return fit_calibration(recording, steps, gate_rounds=gate_rounds_for_test()).policy


def test_one_price_moves_exits_and_band(table):
    assert table.gate_threshold(0.0) == 0.0 and 0 < table.gate_threshold(math.inf) < 0.95
    assert (
        list(table.gate_thresholds) == sorted(table.gate_thresholds)
        and len(set(table.gate_thresholds)) > 2
    )
    made = gate_rounds_for_test()
    for lambda_, row, gate_threshold, more in zip(
        table.lambdas, table.rows, table.gate_thresholds, table.rounds, strict=True
    ):
        assert (table.thresholds(lambda_), table.gate_threshold(lambda_)) == (row, gate_threshold)
        assert gate_threshold == made.gate_threshold(
            lambda_, 1.0
        ) and more == made.rounds_per_token(gate_threshold)
    between = (table.lambdas[3] + table.lambdas[4]) / 2
    assert table.gate_threshold(between) == table.gate_thresholds[4]


def test_rounds_are_in_the_expected_cost(table):
    free = dataclasses.replace(table.steps, round=0.0)
    more = np.subtract(table.costs(), table.costs(free))
    np.testing.assert_allclose(more, table.rounds)


def test_a_table_with_bands_survives_json_and_its_hash_follows_them(table):
    raw = json.loads(json.dumps(table.to_dict()))
    assert PolicyTable.from_dict(raw) == table
    plain = dataclasses.replace(table, gate_thresholds=(), rounds=())
    assert plain.sha256 != table.sha256 and plain.gate_threshold(1.0) is None
    assert "bands" not in plain.to_dict()
    del raw["bands"], raw["rounds"], raw["steps"]["round"]  # as earlier releases wrote it
    old = PolicyTable.from_dict(raw)
    assert old.sha256 == plain.sha256 and old.steps.round == 0.0
    for wrong in (
        {"gate_thresholds": table.gate_thresholds[:-1]},
        {"gate_thresholds": tuple(reversed(table.gate_thresholds))},
        {"rounds": ()},
    ):
        with pytest.raises(DeliberateError, match="gate threshold"):
            dataclasses.replace(table, **wrong)


def test_too_few_uncertain_tokens_choose_no_band():
    recording = synthetic_recording(60, slopes=(1.5, 2.0), offsets=(0.5, 1.5))
    few = gate_rounds_for_test(LEAST_UNCERTAIN_TOKENS - 1)
    with pytest.raises(DeliberateError, match=f"{LEAST_UNCERTAIN_TOKENS} are needed"):
        fit_calibration(recording, StepCosts(1.0, (1.0, 1.0)), gate_rounds=few)


# -- the cost --------------------------------------------------------------------------------------


def test_thinking_is_timed_by_the_given_clock():
    model = gated_model()
    ticks = itertools.count()
    cost = measure_rounds(model.gate, model.backbone, context=9, clock=lambda: 1.0 * next(ticks))
    assert (cost.remember, cost.round_seconds) == (1.0, 1.0)
    with pytest.raises(DeliberateError, match="remember"):
        DeliberationCost(float("nan"), PassCost(1.0))


def test_the_measured_model_has_the_gate_and_its_own_fingerprint():
    model = gated_model()
    parts = model.backbone, model.reader(), model.exit_config
    cost = measure(*parts, gate=model.gate, grid=SMALL)
    assert cost.deliberation is not None and cost.round_seconds > 0 and cost.remember_seconds > 0
    assert cost.fingerprint == fingerprint(model.backbone, model.exit_config, model.gate)
    assert cost.fingerprint != fingerprint(model.backbone, model.exit_config)
    again = CostModel.from_dict(json.loads(json.dumps(cost.to_dict())))
    assert again == cost
    old = cost.to_dict()
    del old["thinking"]
    assert CostModel.from_dict(old).deliberation is None


def test_a_generation_is_charged_for_passes_at_the_top_and_for_rounds():
    model = gated_model()
    plain = tiny_cost(model)
    cost = dataclasses.replace(plain, deliberation=COST)
    passes = [(0, 1, 1, 9), (0, 1, 1, 10), (1, 1, 2, 10), (2, 1, 2, 10)]
    rounds: list[int] = []
    work = Work((1, 2), passes, prompts=(1, 8), deliberation_rounds=rounds)
    meter = WorkMeter(cost, work)
    base = predict_seconds(plain, work)
    assert meter.seconds() == pytest.approx(base + 2 * COST.remember)  # prompt and one pass
    rounds += [1, 3]
    assert meter.seconds() == pytest.approx(base + 2 * COST.remember + 2e-3 + 4e-3)
    assert meter.seconds() == pytest.approx(base + 2 * COST.remember + 2e-3 + 4e-3)
    off = dataclasses.replace(work, deliberation_rounds=None)
    assert predict_seconds(cost, off) == pytest.approx(base)


def test_every_way_to_the_top_costs_the_gate():
    model = gated_model()
    plain = tiny_cost(model)
    cost = dataclasses.replace(plain, deliberation=COST)
    more = pytest.approx(COST.remember)
    assert cost.dense_seconds_per_token() - plain.dense_seconds_per_token() == more
    steps = np.subtract(cost.continuation_seconds(), plain.continuation_seconds())
    np.testing.assert_allclose(steps, [0.0, COST.remember], atol=1e-12)
    assert 0 < cost.least_seconds_per_token(4) - plain.least_seconds_per_token(4) < COST.remember


# -- decoding at a price ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed_lambda():
    """A model whose calibration has bands around those of random models."""
    model = gated_model(rounds=1)
    made = tiny_calibration(model)
    table_ = made.policy
    gate_thresholds = np.append(0.0, np.linspace(BAND, 2 * BAND, len(table_.lambdas) - 1))
    table_ = dataclasses.replace(
        table_, gate_thresholds=tuple(gate_thresholds), rounds=tuple(gate_thresholds / 2)
    )
    certificates = [
        dataclasses.replace(
            c, policy=table_.sha256, gate_threshold=BAND if c.risk == "accuracy" else None
        )
        for c in made.certificates
    ]
    made = dataclasses.replace(made, policy=table_).with_certificates(*certificates)
    model.set_calibration(made)
    return model


def test_a_price_sets_thresholds_and_band(fixed_lambda):
    ids, mask = left_padded([5])
    table_ = fixed_lambda.calibration.policy
    taken = []
    for place in (0, len(table_.lambdas) // 2, -1):
        lambda_ = table_.lambdas[place]
        out = decode(fixed_lambda, ids, mask, "threshold", lambda_=lambda_)
        exit_policy = FixedPolicy(table_.rows[place], table_.gate_thresholds[place])
        same = decode(fixed_lambda, ids, mask, "threshold", exit_policy=exit_policy)
        assert (tokens(out), rounds(out)) == (tokens(same), rounds(same))
        taken.append(out.trace.rounds)
    assert taken[0] == 0 < taken[-1]
    own = decode(fixed_lambda, ids, mask, "dense")
    at_own = decode(
        fixed_lambda, ids, mask, "threshold", exit_policy=FixedPolicy((math.inf, math.inf), BAND)
    )
    assert (tokens(at_own), rounds(at_own)) == (tokens(own), rounds(own))


def test_a_price_belongs_to_threshold_mode_and_needs_a_calibration(fixed_lambda):
    ids, mask = left_padded([5])
    with pytest.raises(DeliberateError, match="threshold"):
        decode(fixed_lambda, ids, mask, "exact", lambda_=1.0)
    with pytest.raises(DeliberateError, match=r"lambda_=-1.0 must be"):
        decode(fixed_lambda, ids, mask, "threshold", lambda_=-1.0)
    with pytest.raises(DeliberateError, match="calibration"):
        decode(gated_model(), ids, mask, "threshold", lambda_=1.0)


def test_exact_mode_keeps_the_band_of_dense_whatever_a_pacer_says(fixed_lambda):
    ids, mask = left_padded([5])
    own = decode(fixed_lambda, ids, mask, "dense")
    exit_policy = FixedPolicy((0.013, 0.013), 0.0)
    out = decode(fixed_lambda, ids, mask, "exact", exit_policy=exit_policy)
    assert (tokens(out), rounds(out)) == (tokens(own), rounds(own))


def test_certified_mode_thinks_by_the_certificates_band(fixed_lambda):
    ids, mask = left_padded([5])
    for risk, gate_threshold in (("accuracy", BAND), ("token", None)):
        certificate = fixed_lambda.calibration.certificate(risk)
        assert certificate.gate_threshold == gate_threshold
        out = decode(fixed_lambda, ids, mask, "certified", risk=risk)
        exit_policy = FixedPolicy(certificate.thresholds, gate_threshold)
        same = decode(fixed_lambda, ids, mask, "threshold", exit_policy=exit_policy)
        assert (tokens(out), rounds(out)) == (tokens(same), rounds(same))


def test_a_certificate_without_a_band_reads_as_before(fixed_lambda):
    with_band, without = (fixed_lambda.calibration.certificate(r) for r in ("accuracy", "token"))
    assert "band" not in without.to_dict()
    for one in (with_band, without):
        assert Certificate.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    raw = json.loads(json.dumps(fixed_lambda.calibration.to_dict()))
    assert Calibration.from_dict(raw) == fixed_lambda.calibration


def test_a_budget_moves_the_band_with_its_price(fixed_lambda, monkeypatch):
    cost = dataclasses.replace(tiny_cost(fixed_lambda, 1e-6), deliberation=COST)
    monkeypatch.setattr(fixed_lambda.guarantees, "_cost", cost)
    ids, mask = left_padded([5])
    table_ = fixed_lambda.calibration.policy
    controller = SimpleNamespace(lambda_=0.0, thresholds=lambda _now, _tokens: (0.0, 0.0))
    exit_policy = BudgetPolicy(controller, table_, cost, (1, 2), lambda _speed: None)  # type: ignore[arg-type]
    assert exit_policy.gate_threshold is None  # nothing is decided yet: the gate's own
    for lambda_ in (0.0, table_.lambdas[2], math.inf):
        controller.lambda_ = lambda_
        exit_policy.on_step(0.0, 1)
        assert exit_policy.gate_threshold == table_.gate_threshold(lambda_)
    # With all the time there is, the dearest price: nobody leaves, and from the second token on,
    # the first that was decided about, the widest band.
    out = decode(fixed_lambda, ids, mask, "budget", latency_budget={"ms_per_token": 1e6})

    class WidestLater(ExitPolicy):
        thresholds = table_.rows[-1]

        def on_step(self, now, tokens):
            self.gate_threshold = table_.gate_thresholds[-1]

    same = decode(fixed_lambda, ids, mask, "threshold", exit_policy=WidestLater())
    assert (tokens(out), rounds(out)) == (tokens(same), rounds(same))
    assert sum(rounds(out)[0]) > 0


def test_rounds_that_gain_exactly_what_they_cost_are_not_taken() -> None:
    probability, helped = np.array([0.4, 0.6]), np.array([1, 0])
    assert best_gate_threshold(probability, helped, round_seconds=2.0, lambda_=2.0) == 0.0
    assert best_gate_threshold(probability, helped, round_seconds=1.0, lambda_=2.0) > 0.4
