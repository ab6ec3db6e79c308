"""The cost of several steps in one call: measured, fitted, predicted, and what it does to exits."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latency_plant import EXITS, plant_cost
from tiny_models import random_ids, tiny_model

from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.break_even import break_even_rate, drop_unprofitable
from deliberate.config import MAX_CALL_STEPS
from deliberate.cost.fit import TimedPart, fit_multi_step
from deliberate.cost.grid import Grid
from deliberate.cost.measure import measure
from deliberate.cost.meter import Work, WorkMeter, predict_seconds
from deliberate.cost.model import CostModel
from deliberate.cost.parts import MultiStepCost, PassCost
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.kernels import native_build
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads
from deliberate.trace import MultiStepRecord
from deliberate.utils.errors import DeliberateError

SMALL = Grid(tokens=(1, 3), contexts=(8, 16), batches=(1, 2), prompts=(4, 8), steps=12, rounds=2)
needs_kernels = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


def ahead_cost(call: float = 5e-5, step: float = 1e-4, per_key: float = 1e-7) -> MultiStepCost:
    """Four boundaries, each as much deeper as the one before."""
    calls = tuple(call * (1 + k) for k in range(4))
    return MultiStepCost(calls, tuple(PassCost(step * (1 + k), per_key=per_key) for k in range(4)))


def plant(**settings) -> CostModel:
    return dataclasses.replace(plant_cost(), multi_step=ahead_cost(**settings))


def test_the_fit_recovers_the_calls_that_made_the_times():
    truth, single, several = ahead_cost(), [], []
    for context in (32, 128, 512):
        for k in range(4):
            for parts, steps in ((single, 1), (several, MAX_CALL_STEPS)):
                # Their own context: a call's steps see a few keys more than `TimedPart` says.
                seconds = truth.calls[k] + steps * truth.step_seconds(k, context)
                parts.append(TimedPart("ahead", k, 1, steps, context, [seconds] * 3))
    fitted = fit_multi_step([PassCost(1.0)] * 4, single, several)
    assert fitted.calls == pytest.approx(truth.calls)
    for mine, other in zip(fitted.steps, truth.steps, strict=True):
        assert (mine.base, mine.per_key) == pytest.approx((other.base, other.per_key), rel=1e-6)


def test_an_exit_that_is_never_asked_in_a_run_costs_what_a_step_alone_costs():
    single = [TimedPart("ahead", 1, 1, 1, 32, [3.0])]
    several = [TimedPart("ahead", 1, 1, 8, 32, [10.0])]
    fitted = fit_multi_step([PassCost(0.25), PassCost(0.5)], single, several)
    assert fitted.calls == (0.0, 2.0)
    assert fitted.steps[0] == PassCost(0.25) and fitted.step_seconds(1, 32) == pytest.approx(1.0)


def test_steps_of_one_call_are_priced_as_one_call_and_the_rest_as_before():
    cost = plant()
    # Three drafts to the first exit in one call, the last of which goes on with the other two.
    passes = [(0, 1, 1, 41), (0, 1, 1, 42), (0, 1, 1, 43)]
    rest = [(1, 1, 3, 43), (2, 1, 3, 43), (3, 1, 3, 43)]
    reads = [(0, 1)] * 3 + [(1, 1)]
    work = Work(EXITS, passes + rest, reads=reads, runs=[MultiStepRecord(0, 0, 0, 3, 3)])
    expected = cost.multi_step.calls[0] + sum(
        cost.multi_step.step_seconds(0, c) for c in (40, 41, 42)
    )
    expected += sum(cost.segment_seconds(k, tokens=3, context=40) for k in (1, 2, 3))
    expected += cost.read_seconds(1) + cost.head_seconds
    assert predict_seconds(cost, work) == pytest.approx(expected)


def test_a_run_to_the_top_contains_its_head():
    cost = plant()
    passes = [(k, 1, 1, 41 + step) for step in range(2) for k in range(4)]
    work = Work(EXITS, passes, reads=[], runs=[MultiStepRecord(0, 0, 3, 2, 0)])
    expected = cost.multi_step.calls[3] + 2 * cost.multi_step.step_seconds(3, 40.5)
    assert predict_seconds(cost, work) == pytest.approx(expected)


def test_without_the_cost_of_runs_their_passes_are_priced_one_by_one():
    cost = plant_cost()
    passes = [(0, 1, 1, 41), (0, 1, 1, 42)]
    plain = Work(EXITS, passes, reads=[(0, 1)] * 2)
    runs = dataclasses.replace(plain, runs=[MultiStepRecord(0, 0, 0, 2, 2)])
    assert predict_seconds(cost, runs) == predict_seconds(cost, plain)


def test_a_meter_adds_up_to_the_prediction_with_runs_in_between():
    cost = plant()
    work = Work(EXITS, [], reads=[], runs=[])
    meter = WorkMeter(cost, work)
    for start in (40, 60, 80):
        work.runs.append(MultiStepRecord(len(work.passes), len(work.reads), 0, 2, 1))
        work.passes.extend([(0, 1, 1, start + 1), (0, 1, 1, start + 2)])
        work.reads.append((0, 1))
        meter.seconds()
        work.passes.extend((k, 1, 2, start + 2) for k in (1, 2, 3))
        work.reads.append((1, 1))
        total = meter.seconds()
    assert total == pytest.approx(predict_seconds(cost, work)) and meter.seconds() == total


# -- exits that pay --------------------------------------------------------------------------------


@given(call=st.floats(0, 5e-4), step=st.floats(1e-5, 2e-3))
def test_at_the_break_even_rate_a_run_of_drafts_costs_what_dense_costs(call, step):
    cost = plant(call=call, step=step, per_key=0.0)
    rate = break_even_rate(cost, 0, multi_step=True)
    top = cost.multi_step.step_seconds(3, 128) + cost.multi_step.calls[3] / MAX_CALL_STEPS
    draft = cost.multi_step.step_seconds(0, 128) + cost.all_deferred_seconds()
    above = sum(cost.passed_on_seconds(k) for k in (1, 2, 3)) + cost.answer_seconds
    if math.isinf(rate):
        assert draft >= top
    else:
        requested = draft + (1 - rate) * (cost.multi_step.calls[0] + above)
        assert requested == pytest.approx(top) or (rate == 0.0 and requested < top)


def test_an_exit_that_would_pay_step_by_step_is_dropped_where_whole_steps_come_in_one_call():
    slow, quick = plant_cost(), plant(call=2e-4, step=5e-5)
    rates = [0.4, 0.0, 0.0]
    assert drop_unprofitable(slow, rates)[0] == (2,)
    kept, reasons = drop_unprofitable(quick, rates)
    assert kept == () and len(reasons) == 3


def test_only_the_first_exit_that_is_asked_is_part_of_a_run():
    cost = plant()
    assert break_even_rate(cost, 1) == break_even_rate(plant_cost(), 1)
    assert break_even_rate(cost, 1, multi_step=True) != break_even_rate(cost, 1)
    # Layers that are skipped and never run are no part of it.
    skipped = break_even_rate(cost, 0, deferred=False)
    assert break_even_rate(cost, 0, deferred=False, multi_step=True) == skipped


# -- keeping, refusing -----------------------------------------------------------------------------


def test_it_survives_json_and_is_restricted_with_its_exits():
    cost = plant()
    assert CostModel.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost
    two = cost.restricted((2, 6))
    assert two.multi_step.calls == tuple(cost.multi_step.calls[k] for k in (0, 2, 3))
    assert cost.restricted(()).multi_step.steps == cost.multi_step.steps[3:]
    # Kept before there was such a thing.
    old = plant_cost().to_dict()
    del old["ahead"]
    assert CostModel.from_dict(old) == plant_cost()


def test_counts_that_do_not_fit_are_one_line():
    for wrong in (
        lambda: MultiStepCost((1.0,), ()),
        lambda: MultiStepCost((-1.0,), (PassCost(1.0),)),
        lambda: MultiStepCost((math.nan,), (PassCost(1.0),)),
        lambda: dataclasses.replace(
            plant_cost(), multi_step=MultiStepCost((1.0,), (PassCost(1.0),))
        ),
    ):
        with pytest.raises(DeliberateError) as error:
            wrong()
        assert "\n" not in str(error.value) and "multi" in str(error.value)


# -- of a real executor ----------------------------------------------------------------------------


def fused(engine: str) -> AdaptiveModel:
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    return AdaptiveModel(base, [1, 2], executor="fused", engine=engine)


@needs_kernels
def test_a_measurement_of_an_executor_that_runs_ahead_prices_its_calls():
    model = fused("native")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = measure(model.backbone, model.reader(), model.exit_config, grid=SMALL)
    assert cost.multi_step is not None and len(cost.multi_step.steps) == 3
    assert all(cost.multi_step.step_seconds(k, 12) > 0 for k in range(3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plain = fused("eager")
    assert measure(*parts_of(plain), grid=SMALL).multi_step is None


def parts_of(model):
    return model.backbone, model.reader(), model.exit_config


@needs_kernels
def test_exits_behind_a_gate_are_priced_though_no_run_asks_them():
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    exits = ExitConfig.build(4, [1, 2], 0.9, measure="gate")
    model = AdaptiveModel(base, exits, executor="fused", engine="native")
    cost = measure(*parts_of(model), grid=SMALL)
    assert cost.multi_step is not None and cost.multi_step.calls[:2] == (0.0, 0.0)
    alone = cost.step + cost.segment_seconds(0, context=12) + cost.read_seconds(0)
    assert cost.multi_step.step_seconds(0, 12) == pytest.approx(alone)


def test_a_measurement_of_the_cuda_executor_prices_its_calls():
    base = tiny_model("qwen2", layers=4, dtype=torch.float32)
    backbone = CudaFusedBackbone(base, ops=True)
    exits = ExitConfig.build(4, [1, 2], 0.9)
    heads = ExitHeads(exits, backbone.hidden_size)
    reader = backbone.exit_reader(heads, model_bytes=1 << 20)
    cost = measure(backbone, reader, exits, grid=SMALL)
    assert cost.multi_step is not None and len(cost.multi_step.steps) == 3


@needs_kernels
@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_a_generation_notes_which_of_its_passes_were_steps_of_one_call(fidelity):
    loop = AdaptiveDecoding(fused("native"), fidelity, 0.02).loop(max_new_tokens=20, end_tokens=())
    for _ in loop.run(random_ids(6)):
        pass
    batch = loop.batch
    assert batch.runs
    covered, requested = set(), set()
    for run in batch.runs:
        own = range(run.first, run.first + run.steps * (run.boundary + 1))
        assert [batch.passes[i].segment for i in own] == [*range(run.boundary + 1)] * run.steps
        keys = [batch.passes[i].keys for i in own if batch.passes[i].segment == 0]
        assert keys == list(range(keys[0], keys[0] + run.steps))
        reads = range(run.read, run.read + run.evaluated)
        assert all(batch.reads[i] == (run.boundary, 1) for i in reads)
        assert not covered & set(own) and not requested & set(reads)
        covered |= set(own)
        requested |= set(reads)
