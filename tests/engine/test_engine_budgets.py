"""Latency budgets in the engine: each request has a controller of its own, and its own report."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixed_requests import alone, taken_thresholds
from simulated_machine import SimulatedMachine
from tiny_models import random_ids, tiny_model

from deliberate.api.loop_builder import Extent, Hooks, build_loop
from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec
from deliberate.policies.budget import LatencyBudget
from deliberate.utils.errors import DeliberateError

NEW = 40


@pytest.fixture
def machine(monkeypatch) -> SimulatedMachine:
    return SimulatedMachine(monkeypatch)


def budgeted(budget, seed: int = 0, new: int = NEW, **changes) -> Request:
    spec = DecodingSpec(gate=False)
    return Request(random_ids(8, seed=seed)[0], new, spec, end_tokens=(), budget=budget, **changes)


def finish(engine) -> dict:
    """Last output of each request; its trace has the tokens."""
    outputs = {}
    while engine.unfinished:
        outputs |= {one.id: one for one in engine.step() if one.finished is not None}
    return outputs


def generated(machine, request: Request):
    """The same request by `generate`'s loop, on the machine's clock."""
    extent = Extent(
        request.max_new_tokens, (), prompt_tokens=len(request.prompt_ids), chooser=request.sampling
    )
    budget = LatencyBudget(**request.budget)
    loop = build_loop(machine.model, request.spec, Hooks(), budget, extent)
    loop.stopwatch.clock = machine.clock
    for _ in loop.run([torch.tensor(request.prompt_ids)]):
        pass
    return loop.trace, loop.exit_policy.report


@pytest.mark.parametrize(
    "budget",
    [
        *({"ms_per_token": ms} for ms in (2.4, 3.0, 4.0, 5.0, 20.0)),
        *({"deadline_ms": ms} for ms in (110.0, 160.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampled", [False, True])
def test_alone_in_an_engine_a_budget_takes_the_exits_that_generate_takes(
    machine, monkeypatch, budget, sampled
):
    request = budgeted(budget, sampling=TokenChooser(sample=True, seed=3) if sampled else None)
    engine = machine.model.engine(clock=machine.clock)
    number = engine.add(request)
    output = finish(engine)[number]
    with monkeypatch.context() as patch:
        other = SimulatedMachine(patch)
        trace, report = generated(other, request)
    assert output.trace.tokens == trace.tokens
    assert output.trace.exit_layers == trace.exit_layers
    assert dataclasses.astuple(output.budget) == pytest.approx(dataclasses.astuple(report))
    assert output.budget.tokens == NEW
    early = sum(layer < 6 for layer in trace.exit_layers)
    assert (early == 0) is (budget == {"ms_per_token": 20.0})


def test_side_by_side_each_request_is_steered_by_its_own_controller(machine):
    plain = [
        Request(random_ids(9, seed=n)[0], 30, DecodingSpec(gate=False, **how), end_tokens=())
        for n, how in enumerate(
            [
                {"fidelity": "dense"},
                {"fidelity": "exact", "thresholds": 0.2, "online": False},
                {"fidelity": "threshold", "thresholds": 0.2},
            ]
        )
    ]
    budgets = [{"ms_per_token": ms} for ms in (5.0, 7.5, 15.0, 1e4)] + [{"deadline_ms": 400.0}]
    requests = plain + [budgeted(one, seed=5 + n, new=30) for n, one in enumerate(budgets)]
    engine = machine.model.engine(max_running=5, clock=machine.clock)
    numbers = [engine.add(request) for request in requests]
    taken = {number: taken_thresholds(engine, number) for number in numbers}
    outputs = finish(engine)
    for number, request in zip(numbers[:3], plain, strict=True):
        assert outputs[number].trace.tokens == alone(machine.model, request)[0]
        assert outputs[number].budget is None
    depths = []
    for number, request in zip(numbers[3:], requests[3:], strict=True):
        output = outputs[number]
        tokens, _, layers = alone(machine.model, request, taken[number])
        assert (output.trace.tokens, output.trace.exit_layers) == (tokens, layers)
        report = output.budget
        assert report.tokens == 30 and report.budget == str(LatencyBudget(**request.budget))
        assert report.seconds == pytest.approx(output.trace.seconds)
        assert report.met is (1e3 * report.seconds <= report.allowed_ms)
        # The cost model prices what others ran, and their prompts.
        assert 0.8 < report.speed < 1.25
        depths.append(sum(layers))
    assert depths[0] < depths[1] < depths[3] == 6 * 30


def test_preempted_and_starved_of_blocks_a_budget_takes_the_exits_of_its_thresholds(machine):
    cache = machine.model.backbone.new_block_cache(16, block_size=4, max_rows=4)
    engine = machine.model.engine(max_running=4, cache=cache, clock=machine.clock)
    requests = [budgeted({"ms_per_token": 8.0 + n}, seed=n, new=20) for n in range(8)]
    numbers = [engine.add(request) for request in requests]
    taken = {number: taken_thresholds(engine, number) for number in numbers}
    outputs = finish(engine)
    for number, request in zip(numbers, requests, strict=True):
        tokens, _, layers = alone(machine.model, request, taken[number])
        assert outputs[number].trace.tokens == tokens
        assert outputs[number].trace.exit_layers == layers
    assert engine.stats().preempted > 0
    assert (engine.stats().running, engine.stats().free_blocks) == (0, 16)


def test_what_a_request_waits_counts_against_its_budget(machine):
    engine = machine.model.engine(max_running=1, clock=machine.clock)
    machine.now = 10.0
    first, second = (engine.add(budgeted({"ms_per_token": 7.0}, seed=n)) for n in range(2))
    outputs = finish(engine)
    assert outputs[first].budget.met and not outputs[second].budget.met
    assert outputs[second].budget.seconds > 1.5 * outputs[first].budget.seconds
    earlier = machine.now - 2.0  # when a client asked for it
    number = engine.add(budgeted({"ms_per_token": 50.0}, arrival=earlier))
    assert finish(engine)[number].budget.seconds == pytest.approx(machine.now - earlier)


def test_a_deadline_of_a_budget_orders_requests_as_one_of_the_request_does(machine):
    engine = machine.model.engine(max_running=1, clock=machine.clock)
    late = engine.add(budgeted({"ms_per_token": 50.0}))
    soon = engine.add(budgeted({"deadline_ms": 300.0}, seed=1))
    own = engine.add(budgeted({"deadline_ms": 500.0}, seed=2, deadline=0.1))
    ended = list(finish(engine))
    assert ended == [own, soon, late]


def test_a_budget_that_the_running_requests_leave_no_time_for_is_refused_with_the_least(machine):
    engine = machine.model.engine(max_running=4, clock=machine.clock)
    tight = budgeted({"ms_per_token": 2.4})
    engine.add(tight)
    engine.add(Request([1, 2], 5, DecodingSpec(gate=False, fidelity="dense"), end_tokens=()))
    said = r"2.4 ms per token\) cannot be met: the least possible here is .* 3 requests share"
    with pytest.raises(DeliberateError, match=said):
        engine.add(tight)
    finish(engine)
    engine.add(tight)
    with pytest.raises(DeliberateError, match=r"1 ms per token.* cannot be met: the") as caught:
        machine.model.engine(clock=machine.clock).add(budgeted({"ms_per_token": 1.0}))
    assert "share" not in str(caught.value)


def test_a_slower_machine_makes_a_running_request_exit_earlier(machine):
    engine = machine.model.engine(clock=machine.clock)
    number = engine.add(budgeted({"ms_per_token": 9.0}, new=60))
    for _ in range(25):
        engine.step()
    machine.slowdown = 2.5
    output = finish(engine)[number]
    layers = output.trace.exit_layers
    assert set(layers[:20]) == {6} and min(layers[30:]) == 1
    assert output.budget.speed > 2.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "L9"}, "latency tier 'L9' is unknown"),
        ({"budget": {"ms_per_token": 0}}, "ms_per_token = 0 is impossible"),
        ({"budget": 3}, "latency budget 3: give LatencyBudget"),
        ({"spec": DecodingSpec(fidelity="budget")}, "fidelity 'budget' needs latency_budget"),
        (
            {"budget": "L1", "spec": DecodingSpec(fidelity="exact")},
            "latency_budget with fidelity 'exact'",
        ),
    ],
)
def test_a_budget_that_cannot_be_obeyed_is_refused_by_name(machine, changes, said):
    engine = machine.model.engine()
    with pytest.raises(DeliberateError, match=said):
        engine.add(Request(**({"prompt_ids": [1, 2], "max_new_tokens": 4} | changes)))
    assert engine.unfinished == 0


def test_a_model_without_calibration_refuses_a_budget_before_it_measures_anything(monkeypatch):
    model = AdaptiveModel(tiny_model("llama"), [1, 2])
    monkeypatch.setattr(model.guarantees, "cost", lambda _: pytest.fail("measured"))
    with pytest.raises(DeliberateError, match="calibrat"):
        model.engine().add(Request([1, 2], 3, budget="L3"))


def test_requests_of_one_budget_learn_from_each_other(machine):
    budget = LatencyBudget(ms_per_token=9.0)
    engine = machine.model.engine(clock=machine.clock)
    machine.slowdown = 1.5
    for seed in range(3):
        engine.add(budgeted(budget, seed=seed))
    finish(engine)
    shared = machine.model.guarantees.budget(machine.model, budget, 0).shared
    assert len(shared.lengths) == 3 and shared.speed == pytest.approx(1.5, rel=0.1)
