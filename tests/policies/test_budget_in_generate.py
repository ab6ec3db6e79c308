"""What a latency budget promises in `generate`, and when it refuses to."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from calibrated_model import NEW, PROMPT, Ticking, generate
from tiny_models import random_ids

from deliberate.api.generation import AdaptiveDecoding
from deliberate.policies.budget import LatencyBudget
from deliberate.utils.errors import DeliberateError


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "fast", True])
@pytest.mark.parametrize("name", ["ms_per_token", "deadline_ms"])
def test_an_impossible_budget_is_one_line_that_names_the_value(model, name, value) -> None:
    with pytest.raises(DeliberateError, match=f"{name} = .*number of milliseconds") as caught:
        generate(model, latency_budget={name: value})
    assert "\n" not in str(caught.value) and str(value) in str(caught.value)


def test_an_infeasible_budget_is_refused_before_decoding_with_the_least_possible(model) -> None:
    calls = []
    handle = model.base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(DeliberateError, match="cannot be met: the least possible") as caught:
            generate(model, latency_budget=LatencyBudget(ms_per_token=0.5))
    finally:
        handle.remove()
    assert calls == []
    stated = float(str(caught.value).split("least possible here is ")[1].split(" ms")[0])
    assert 1.0 < stated < 4.0, "between one layer and all four, at 1 ms each"
    assert generate(model, latency_budget=LatencyBudget(ms_per_token=1e4)).budget.met


def test_a_deadline_is_infeasible_for_a_long_prompt_only(model) -> None:
    budget = LatencyBudget(deadline_ms=60.0)
    feasible = [model.guarantees.feasibility(model, budget, n, NEW).feasible for n in (5, 100)]
    assert feasible == [True, False]


def test_a_budget_and_its_fidelity_belong_together(model) -> None:
    with pytest.raises(DeliberateError, match="fidelity 'budget' needs latency_budget"):
        generate(model, fidelity="budget")
    with pytest.raises(DeliberateError, match="latency_budget with fidelity 'exact'"):
        generate(model, fidelity="exact", latency_budget="L3")
    assert generate(model, latency_budget="L3").budget.budget == "deadline of 1000 ms"


def paced(model, budget, seconds: float):
    """A generation on a clock that gains `seconds` at each reading."""
    loop = AdaptiveDecoding(model, latency_budget=budget).loop(max_new_tokens=NEW, end_tokens=())
    loop.stopwatch.clock = Ticking(seconds)
    for _ in loop.run(random_ids(PROMPT)):
        pass
    return loop


def test_a_tight_budget_takes_shallower_exits_than_an_ample_one(model) -> None:
    # Exits of a random model hardly ever reach the scores that a policy asks for: the guard does.
    tight = paced(model, LatencyBudget(ms_per_token=2.4), 2e-3)
    ample = paced(model, LatencyBudget(ms_per_token=1e3), 1e-6)
    assert tight.trace.layers_per_token < ample.trace.layers_per_token
    assert 1 in tight.trace.exit_layers and tight.exit_policy.report.guarded > 0
    assert set(ample.trace.exit_layers) == {4} and ample.exit_policy.report.guarded == 0


def test_the_report_is_of_the_clock_that_the_loop_was_given(model) -> None:
    slow = paced(model, LatencyBudget(ms_per_token=5.0), 1.0).exit_policy.report
    assert not slow.met and slow.seconds > NEW and slow.tokens == NEW
    assert slow.allowed_ms == pytest.approx(5.0 * NEW)


def interleaved(model, budget, clocks: list[Ticking]):
    """Generations that take turns, token by token, each on its own clock."""
    loops = []
    for clock in clocks:
        loop = AdaptiveDecoding(model, latency_budget=budget).loop(
            max_new_tokens=NEW, end_tokens=()
        )
        loop.stopwatch.clock = clock
        loops.append(loop)
    runs = [loop.run(random_ids(PROMPT, seed=seed)) for seed, loop in enumerate(loops)]
    while runs:
        runs = [one for one in runs if next(one, None) is not None]
    return loops


def test_generations_that_take_turns_are_each_steered_and_reported_by_their_own_time(model) -> None:
    budget = LatencyBudget(ms_per_token=50.0)
    slow, fast = interleaved(model, budget, [Ticking(0.5), Ticking(1e-6)])
    assert not slow.exit_policy.report.met and slow.exit_policy.report.seconds > NEW
    assert fast.exit_policy.report.met and fast.exit_policy.report.seconds < 1e-3
    assert slow.exit_policy.report.guarded > 0 and fast.exit_policy.report.guarded == 0
    assert set(fast.trace.exit_layers) == {4} and 1 in slow.trace.exit_layers
    shared = model.guarantees.budget(model, budget).shared
    assert len(shared.lengths) == 2
    speeds = [one.exit_policy.report.speed for one in (slow, fast)]
    assert shared.speed == pytest.approx(math.sqrt(math.prod(speeds))), "of both, by their mean"


def test_threads_with_one_budget_report_what_each_of_them_took(model) -> None:
    budget = LatencyBudget(ms_per_token=50.0)
    paces = [0.5, 1e-6] * 4
    loops = []
    for pace in paces:
        loop = AdaptiveDecoding(model, latency_budget=budget).loop(
            max_new_tokens=NEW, end_tokens=()
        )
        loop.stopwatch.clock = Ticking(pace)
        loops.append(loop)

    def run(loop) -> None:
        for _ in loop.run(random_ids(PROMPT)):
            time.sleep(1e-4)  # so that all of them run at once

    with ThreadPoolExecutor(len(loops)) as pool:
        list(pool.map(run, loops))
    for pace, loop in zip(paces, loops, strict=True):
        report = loop.exit_policy.report
        assert report.tokens == NEW
        assert report.met is (pace < 1e-3)
        assert (report.seconds > NEW) is (pace > 1e-3)
    assert len(model.guarantees.budget(model, budget).shared.lengths) == len(loops)


def test_one_controller_serves_all_generations_of_a_budget(model) -> None:
    budget = LatencyBudget(ms_per_token=1e4)
    first = model.guarantees.budget(model, budget).shared
    assert model.guarantees.budget(model, LatencyBudget(ms_per_token=1e4)).shared is first
    generate(model, latency_budget=budget)
    assert len(first.lengths) == 1, "and remembers how long answers are"
    slow = paced(model, budget, 0.5).exit_policy.report
    assert first.speed == slow.speed > 2, "and how fast the machine is"
    model.set_calibration(model.calibration)
    assert model.guarantees.budget(model, budget).shared is not first


def test_the_drift_monitor_is_told_how_many_early_tokens_full_depth_would_not_choose(model) -> None:
    policy = model.guarantees.certified(model)
    policy.on_compared(3, 5)
    policy.on_compared(2, 2)
    policy.end(1.0, 9)
    assert (policy.drift.disagreements, policy.drift.tokens, policy.drift.answers) == (2, 7, 1)
    policy.end(2.0, 9)
    assert policy.drift.answers == 1, "counts are of one answer each"
