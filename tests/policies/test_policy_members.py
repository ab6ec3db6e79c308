"""Full depth and exact mode are members of every policy family: no guarantee is worse."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from tiny_calibration import tiny_calibration, tiny_cost
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.stopping_policy import PolicyTable, StepCosts
from deliberate.cost.model import CostModel
from deliberate.cost.parts import PassCost, SegmentCost, WarmCost
from deliberate.modeling.exit_config import ExitConfig
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.guarantees import MOST_CONTROLLERS
from deliberate.policies.lengths import recorded_lengths
from deliberate.policies.member_costs import batched, member_costs
from deliberate.utils.errors import DeliberateError

NEW, PROMPT, LAYER, READ = 16, 8, 10e-3, 40e-3
INF = math.inf


@pytest.fixture
def model():
    made = AdaptiveModel(
        tiny_model("llama", dtype=torch.float32), ExitConfig((1, 2), (0.1, 0.1), translator="none")
    )
    made.set_calibration(tiny_calibration(made))
    return made


def with_cost(model: AdaptiveModel, cost: CostModel) -> AdaptiveModel:
    model.guarantees.clear()
    model.guarantees._cost = cost
    return model


def expensive_reads(model: AdaptiveModel) -> CostModel:
    """SmolLM2's case: reading an exit costs as much as several layers."""
    cost = tiny_cost(model, LAYER)
    read = PassCost(READ)
    return replace(cost, reads=(WarmCost(read),) * 2)


def generate(model, **how):
    return model.generate(
        random_ids(PROMPT), max_new_tokens=NEW, return_dict_in_generate=True, **how
    )


# -- costs -----------------------------------------------------------------------------------------


def table(*rows, shares, risks) -> PolicyTable:
    lambdas = (*map(float, range(len(rows) - 1)), INF)
    return PolicyTable(lambdas, rows, risks, shares, StepCosts(1.0, (1.0, 1.0)))


def test_an_exit_with_an_infinite_threshold_costs_nothing(model) -> None:
    cost = expensive_reads(model)
    found = member_costs(
        cost,
        table(
            (0.5, 0.5), (0.9, INF), (INF, INF),
            shares=((0.5, 0.0, 0.5), (0.5, 0.0, 0.5), (0.0, 0.0, 1.0)), risks=(0.3, 0.2, 0.0),
        ),
        max_pending=12, context=64,
    )  # fmt: skip
    assert found.rows[1] == pytest.approx(found.rows[0] - 0.5 * READ)
    assert found.rows[2] == found.dense == cost.dense_seconds_per_token(64)


def test_exact_costs_full_depth_where_drafts_are_wrong_and_the_policy_where_they_are_right(
    model,
) -> None:
    cost = tiny_cost(model, LAYER)
    shares = ((0.9, 0.0, 0.1), (0.0, 0.0, 1.0))
    rows = ((0.5, INF), (INF, INF))
    right, wrong = (
        member_costs(
            cost, table(*rows, shares=shares, risks=(risk, 0.0)), max_pending=12, context=64
        )
        for risk in (0.0, 0.9)
    )
    assert right.exact == pytest.approx(right.rows[0], rel=0.02) and right.exact < right.dense
    assert wrong.exact == wrong.dense


def test_a_batch_costs_what_its_rows_add(model) -> None:
    segment = SegmentCost(WarmCost(PassCost(1.0)), WarmCost(PassCost(2.0, 0.5)), PassCost(3.0, 0.1))
    read = WarmCost(PassCost(0.1, 0.2))
    cost = CostModel((1, 2), 4, (segment,) * 3, (read,) * 2, PassCost(0.3, 0.4))
    several = batched(cost, 32)
    assert several.dense_seconds_per_token(10) == pytest.approx(
        sum(cost.segment_seconds(k, batch=32, context=10) for k in range(3))
        + cost.head.seconds(32, 1, 0)
    )
    assert several.read_seconds(0) == cost.read_seconds(0, rows=32)
    assert batched(cost, 1) is cost


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.05, 1.4, 3.0])
def test_a_budget_that_full_depth_fits_is_decoded_at_full_depth(model, factor) -> None:
    """Rows with exits cost more than dense here: none of them is taken, at any budget."""
    cost = expensive_reads(model)
    with_cost(model, cost)
    dense = generate(model, fidelity="dense")
    each = cost.dense_seconds_per_token() + cost.prompt_seconds(PROMPT) / NEW
    out = generate(model, latency_budget=LatencyBudget(ms_per_token=1e3 * factor * each))
    assert out.sequences.tolist() == dense.sequences.tolist()
    assert set(out.trace.exit_layers) == {4} and math.isinf(out.budget.lambda_)
    assert out.batch.reads == []


def test_a_budget_that_exact_mode_fits_and_full_depth_does_not_is_decoded_exactly(model) -> None:
    cost = with_cost(model, tiny_cost(model, LAYER)).guarantees.cost(model)
    members = model.guarantees.members(model, cost, PROMPT, NEW, 1)
    assert 1.15 * members.exact < members.dense, "or there would be nothing between them"
    each = 1.15 * members.exact + members.prompt / NEW
    dense = generate(model, fidelity="dense")
    out = generate(model, latency_budget=LatencyBudget(ms_per_token=1e3 * each))
    assert out.sequences.tolist() == dense.sequences.tolist()
    assert out.budget.tokens == NEW and out.trace.drafted > 0, "by exact mode, not by dense"
    model.guarantees._exact.extend([50.0] * 9)  # and where it was too slow, it is not taken
    budget = LatencyBudget(ms_per_token=1e3 * each)
    assert model.guarantees.exact_within(model, budget, PROMPT, NEW) is None


def test_feasibility_counts_the_sequences_of_a_batch(model) -> None:
    with_cost(model, tiny_cost(model, LAYER))
    one = model.guarantees.feasibility(model, LatencyBudget(deadline_ms=2000), PROMPT, NEW)
    many = model.guarantees.feasibility(model, LatencyBudget(deadline_ms=2000), PROMPT, NEW, 64)
    assert one.feasible and not many.feasible and many.least_ms > 4 * one.least_ms
    ids = random_ids(PROMPT).expand(64, -1)
    with pytest.raises(DeliberateError, match="cannot be met"):
        model.generate(ids, max_new_tokens=NEW, latency_budget=LatencyBudget(deadline_ms=2000))


def test_a_bounded_number_of_controllers_is_kept_and_a_new_one_knows_the_machine(model) -> None:
    with_cost(model, tiny_cost(model, LAYER))
    guarantees = model.guarantees
    guarantees._speeds.extend([2.0] * 9)
    kept = guarantees.budget(model, LatencyBudget(ms_per_token=500)).shared
    for ms in range(600, 600 + 3 * MOST_CONTROLLERS):
        assert guarantees.budget(model, LatencyBudget(ms_per_token=ms)).controller.speed == (
            pytest.approx(2.0)
        )
        assert guarantees.budget(model, LatencyBudget(ms_per_token=500)).shared is kept
    assert len(guarantees._controllers) == MOST_CONTROLLERS
    assert guarantees.budget(model, LatencyBudget(ms_per_token=500), 2).shared is not kept


# -- lengths ---------------------------------------------------------------------------------------


def test_a_deadline_is_judged_by_the_answers_of_the_calibration_not_by_the_limit(model) -> None:
    with_cost(model, tiny_cost(model, LAYER))
    budget = LatencyBudget(deadline_ms=1500)
    assert not model.guarantees.feasibility(model, budget, PROMPT, 500).feasible
    recorded = replace(model.calibration, meta={"fitted": {"sequences": 100, "tokens": 4000}})
    model.set_calibration(recorded)
    with_cost(model, tiny_cost(model, LAYER))
    found = model.guarantees.feasibility(model, budget, PROMPT, 500)
    assert found.feasible and "40 tokens" in found.message


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"fitted": 3},
        {"fitted": {"sequences": 0, "tokens": 5}},
        {"lengths": [0]},
        {"lengths": 7},
    ],
)
def test_a_calibration_without_lengths_gives_none(meta) -> None:
    assert recorded_lengths(meta) == []
    assert recorded_lengths({**meta, "lengths": [3, 9]}) == [3, 9]


# -- certificates ----------------------------------------------------------------------------------


def test_certified_is_decoded_at_full_depth_where_its_exits_lose_time(model) -> None:
    with_cost(model, expensive_reads(model))
    out, dense = generate(model, fidelity="certified"), generate(model, fidelity="dense")
    assert out.sequences.tolist() == dense.sequences.tolist() and out.batch.reads == []


def test_certified_is_decoded_exactly_where_that_is_as_fast(model) -> None:
    with_cost(model, tiny_cost(model, LAYER))
    careful = len(model.calibration.policy.lambdas) - 2
    table_ = model.calibration.policy
    certificates = [
        replace(c, lambda_=table_.lambdas[careful], thresholds=table_.rows[careful])
        for c in model.calibration.certificates
    ]
    model.set_calibration(model.calibration.with_certificates(*certificates))
    with_cost(model, tiny_cost(model, LAYER))
    members = model.guarantees.members(model, model.guarantees.cost(model), PROMPT, NEW, 1)
    assert 1.1 * members.exact < members.rows[careful]
    out, dense = generate(model, fidelity="certified"), generate(model, fidelity="dense")
    assert out.sequences.tolist() == dense.sequences.tolist() and out.trace.drafted > 0


def test_certified_keeps_its_certificate_where_that_is_faster_or_nothing_was_measured(
    model, tmp_path, monkeypatch
) -> None:
    with_cost(model, tiny_cost(model, LAYER))
    assert generate(model, fidelity="certified").batch.reads
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path))
    model.guarantees.clear()
    assert generate(model, fidelity="certified").batch.reads
    assert list(tmp_path.iterdir()) == [], "and it measures nothing by itself"


def test_members_are_plain_numbers(model) -> None:
    with_cost(model, tiny_cost(model, LAYER))
    found = model.guarantees.members(model, model.guarantees.cost(model), PROMPT, NEW, 3)
    for value in (found.dense, found.exact, found.least, found.prompt, *found.rows):
        assert math.isfinite(value) and value > 0
    assert found.least <= min(found.dense, *found.rows) and found.exact <= found.dense
    assert dataclasses.is_dataclass(found)
