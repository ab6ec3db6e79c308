"""The cost model: predictions add up, exits must pay."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_plant import EXITS, MAX_PENDING, Plant, plant_cost
from warm_costs import warm_cost_model

from deliberate.calibration.break_even import break_even_rate, drop_unprofitable
from deliberate.cost.meter import Work, WorkMeter, predict_seconds
from deliberate.cost.model import CostModel, duration
from deliberate.cost.parts import PassCost, SegmentCost, Staleness, WarmCost
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.utils.errors import DeliberateError


def layer_cost(
    *, layers: int = 24, exits=(2, 12), head: float = 0.0, score: float = 0.0, gate=None
) -> CostModel:
    """Costs in units of one layer, deferred tokens free, as in the published break-even rules."""
    edges = [0, *exits, layers]
    segments = []
    for low, high in itertools.pairwise(edges):
        cost = PassCost(float(high - low))
        segments.append(SegmentCost(WarmCost(cost), WarmCost(cost), cost))
    read = WarmCost(PassCost(head + score if gate is None else gate + score))
    return CostModel(
        tuple(exits),
        layers,
        tuple(segments),
        (read,) * len(exits),
        PassCost(head),
        gated=gate is not None,
    )


# -- break-even ------------------------------------------------------------------------------------


@given(
    head=st.floats(0.01, 30),
    score=st.floats(0, 2),
    exit_layer=st.integers(1, 23),
)
def test_with_the_full_head_an_exit_pays_from_the_published_rate_on(head, score, exit_layer):
    cost = layer_cost(exits=(exit_layer,), head=head, score=score)
    published = (head + score) / (24 - exit_layer + head)
    rate = break_even_rate(cost, 0)
    assert rate == pytest.approx(published) if published <= 1 else math.isinf(rate)


@given(gate=st.floats(0.001, 1), score=st.floats(0, 1), exit_layer=st.integers(1, 23))
def test_behind_a_gate_an_exit_pays_from_the_published_rate_on(gate, score, exit_layer):
    cost = layer_cost(exits=(exit_layer,), head=9.0, score=score, gate=gate)
    published = (gate + score) / (24 - exit_layer)
    rate = break_even_rate(cost, 0)
    assert rate == pytest.approx(published) if published <= 1 else math.isinf(rate)


def test_at_the_break_even_rate_asking_and_not_asking_cost_the_same():
    cost = plant_cost()
    rate = break_even_rate(cost, 0, beyond=1)
    above = cost.passed_on_seconds(1) + cost.read_seconds(1)
    requested = cost.read_seconds(0) + (1 - rate) * above
    assert requested == pytest.approx(above)


def test_an_exit_below_its_break_even_rate_is_dropped_with_the_reason_in_words():
    cost = layer_cost(exits=(2, 12), head=4.0, score=0.0)
    kept, reasons = drop_unprofitable(cost, [0.03, 0.6], deferred=False)
    assert kept == (12,)
    needed = break_even_rate(cost, 0, beyond=1, deferred=False)
    assert reasons == [
        f"exit after layer 2: 3 % of tokens exit; at 4 s per read it pays from "
        f"{100 * needed:.0f} % on: dropped"
    ]


def test_tokens_of_a_dropped_exit_count_at_the_next_one():
    cost = layer_cost(exits=(11, 12), head=6.0)
    # Alone the later exit would fall short; with the tokens of the earlier one it pays.
    share = 0.2
    assert share < break_even_rate(cost, 1) < 1 - (1 - share) * (1 - 0.5)
    kept, reasons = drop_unprofitable(cost, [0.5, share], deferred=False)
    assert kept == (12,) and len(reasons) == 1 and "layer 11" in reasons[0]


def test_an_exit_that_pays_at_no_rate_says_so():
    kept, reasons = drop_unprofitable(layer_cost(exits=(23,), head=1.0, score=5.0), [1.0])
    assert kept == () and "pays at no rate" in reasons[0]


@given(rates=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_every_exit_is_either_kept_or_explained(rates):
    kept, reasons = drop_unprofitable(plant_cost(), rates)
    assert len(kept) + len(reasons) == 3 and set(kept) <= set(EXITS)


@pytest.mark.parametrize("rates", [[0.5], [0.1, 0.2, 1.5], [0.1, 0.2, math.nan]])
def test_rates_that_do_not_fit_are_one_line(rates):
    with pytest.raises(DeliberateError) as error:
        drop_unprofitable(plant_cost(), rates)
    assert "\n" not in str(error.value) and "rate" in str(error.value)


# -- prediction ------------------------------------------------------------------------------------


def test_a_generation_is_predicted_as_the_sum_of_what_it_ran():
    cost = plant_cost()
    passes = [(0, 1, 1, 41), (0, 1, 1, 42), (1, 1, 2, 42), (2, 1, 2, 42), (3, 1, 2, 42)]
    expected = cost.prompt_seconds(40) + 2 * cost.step
    expected += 2 * cost.segment_seconds(0, context=40) + 2 * cost.read_seconds(0)
    expected += sum(cost.segment_seconds(k, tokens=2, context=40) for k in (1, 2, 3))
    expected += cost.read_seconds(1) + cost.read_seconds(2) + cost.head_seconds
    assert predict_seconds(cost, Work(EXITS, passes, prompts=(1, 40))) == pytest.approx(expected)


def test_counted_reads_replace_assumed_ones():
    cost = plant_cost()
    passes = [(0, 1, 1, 41), (1, 1, 1, 41)]
    silent = predict_seconds(cost, Work(EXITS, passes, reads=[]))
    assert predict_seconds(cost, Work(EXITS, passes, reads=[(0, 1)])) == pytest.approx(
        silent + cost.read_seconds(0)
    )
    assert predict_seconds(cost, Work(EXITS, passes)) == pytest.approx(
        silent + cost.read_seconds(0) + cost.read_seconds(1)
    )


def test_a_counted_read_is_as_warm_as_the_pass_before_it():
    cost = warm_cost_model(0.0)
    passes = [(0, 1, 1, 41), (0, 1, 1, 42), (0, 1, 1, 43)]
    counted = Work(EXITS, passes, reads=[(0, 1)] * 3)
    assert predict_seconds(cost, counted) == pytest.approx(
        predict_seconds(cost, Work(EXITS, passes))
    )


def test_a_meter_adds_up_to_the_prediction_however_it_is_read():
    cost = dataclasses.replace(plant_cost(), memory=0.5)
    generator = random.Random(3)
    passes: list[tuple[int, int, int, int]] = []
    work = Work(EXITS, passes, prompts=(1, 7))
    meter = WorkMeter(cost, work)
    seen = meter.seconds()
    for step in range(60):
        for segment in range(generator.randint(1, 4)):
            passes.append((segment, 1, 1 + segment, 8 + step + segment))
        if step % 3 == 0:
            assert meter.seconds() > seen
            seen = meter.seconds()
    assert meter.seconds() == pytest.approx(predict_seconds(cost, work))


def test_dense_work_is_priced_with_all_segments_merged():
    cost = plant_cost()
    work = Work((), [(0, 1, 1, 41)] * 10, prompts=(1, 40))
    assert predict_seconds(cost, work) == pytest.approx(
        cost.prompt_seconds(40) + 10 * cost.dense_seconds_per_token(40)
    )


def test_the_fastest_policy_is_never_slower_than_dense_and_dropping_exits_never_changes_dense():
    cost = plant_cost()
    assert cost.least_seconds_per_token(MAX_PENDING) < 0.5 * cost.dense_seconds_per_token()
    slow_reads = dataclasses.replace(cost, reads=(WarmCost(PassCost(1.0)),) * 3)
    assert slow_reads.least_seconds_per_token(4) == slow_reads.dense_seconds_per_token()
    for layers in ((), (4,), (2, 6)):
        fewer = cost.restricted(layers)
        assert fewer.dense_seconds_per_token() == pytest.approx(cost.dense_seconds_per_token())
    with pytest.raises(DeliberateError, match="layer 3 is not an exit"):
        cost.restricted((3,))


def test_going_on_to_the_top_from_the_first_exit_costs_dense_with_reads():
    """The costs of going on, with what riders pay anyway, add up to a token through all layers."""
    cost = plant_cost()
    warm = tuple(
        SegmentCost(dataclasses.replace(s.single, saved=1e-4), s.several, s.prompt)
        for s in cost.segments
    )
    cost = dataclasses.replace(cost, segments=warm)
    whole = cost.first_seconds() + sum(cost.continuation_seconds()) + cost.all_deferred_seconds()
    reads = sum(cost.read_seconds(k) for k in range(3))
    assert whole == pytest.approx(cost.dense_seconds_per_token() + reads)


def test_the_seconds_of_a_policy_agree_with_a_machine_that_runs_it():
    """Within 10 %, with thresholds at which tokens leave at every exit."""
    cost, row = plant_cost(), (0.45, 0.5, 0.4)
    plant = Plant(cost, seed=4)
    plant.respond(FixedPolicy(row), 3000)
    taken = sum(plant.step_seconds[1:]) / 2999
    steps = (cost.first_seconds(), *cost.continuation_seconds())
    decided = [sum(steps[: k + 1]) for k in plant.exits]
    (expected,) = cost.policy_seconds([sum(decided) / len(decided)], MAX_PENDING)
    assert expected == pytest.approx(taken, rel=0.1)
    assert len(set(plant.exits)) == 4


# -- the processor's cache -------------------------------------------------------------------------


def test_staleness_is_the_share_of_other_layers_run_since():
    stale = Staleness((2, 4, 6, 8), memory=0.0)
    assert stale.run(0) == 1.0  # after the prompt's pass
    assert stale.run(0) == 0.0
    stale.run(1)
    assert stale.run(0) == pytest.approx(2 / 6)
    assert [stale.run(k) for k in (1, 2, 3)][2] == 1.0
    assert stale.run(0) == 1.0


def test_with_memory_a_segment_warms_up_over_several_passes():
    stale = Staleness((2, 4, 6, 8), memory=0.5)
    assert [stale.run(0) for _ in range(3)] == [1.0, 0.5, 0.25]
    for k in (1, 2, 3):
        stale.run(k)
    assert stale.run(0) == pytest.approx(0.125 + 0.5)


def test_without_exits_the_only_segment_is_always_cold():
    stale = Staleness((8,), memory=0.5)
    assert [stale.run(0) for _ in range(3)] == [1.0, 1.0, 1.0]


@given(st.lists(st.integers(0, 3), max_size=40), st.floats(0, 0.95))
def test_staleness_stays_within_its_bounds(segments, memory):
    stale = Staleness((1, 2, 5, 9), memory)
    assert all(0.0 <= stale.run(segment) <= 1.0 for segment in segments)


# -- as data


def test_a_cost_model_survives_json():
    cost = dataclasses.replace(warm_cost_model(0.6), facts={"device": "x"}, fingerprint="f")
    assert CostModel.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


@pytest.mark.parametrize(
    "change",
    [{"format_version": 0}, {"head": None}, {"layers": [2, 4]}, {"step": -1.0}, {"memory": 1.0}],
)
def test_a_foreign_cost_model_is_one_line(change):
    with pytest.raises(DeliberateError) as error:
        CostModel.from_dict(plant_cost().to_dict() | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_costs_are_finite_and_not_negative(value):
    with pytest.raises(DeliberateError):
        PassCost(value)
    with pytest.raises(DeliberateError):
        WarmCost(PassCost(1.0), saved=value)


def test_durations_take_the_unit_that_suits_them():
    assert [duration(s) for s in (0.0019, 42e-6, 3.1, 0.0)] == ["1.9 ms", "42 us", "3.1 s", "0 us"]
