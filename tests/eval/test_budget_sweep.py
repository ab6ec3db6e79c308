"""`deliberate bench budget`: the variants compared, their figures, the step change."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from random_checkpoint import LAYERS, save_checkpoint
from tiny_calibration import keep_tiny_cost, tiny_calibration

from deliberate.api.generation import AdaptiveDecoding
from deliberate.api.model import AdaptiveModel
from deliberate.cost.meter import Work, predict_seconds
from deliberate.engine.exit_rules import RandomPolicy
from deliberate.eval.benchmarks import budget as budget_sweep
from deliberate.eval.benchmarks.budget_points import budget_row, point
from deliberate.eval.benchmarks.budget_step import SlowedClock, TokenTime, WorkClock, judge, stream
from deliberate.eval.benchmarks.budget_variants import (
    Answer,
    Overheads,
    Variant,
    baselines,
    budget_variant,
    decode,
    earliest,
)
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetReport
from deliberate.utils.errors import DeliberateError

NEW = 24
LAYER = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def calibration(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    tiny_calibration(AdaptiveModel.from_pretrained(checkpoint)).save(folder / "calibration.json")
    return folder


@pytest.fixture
def model(checkpoint, calibration, tmp_path, monkeypatch):
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = AdaptiveModel.from_pretrained(checkpoint)
    made.set_calibration(calibration)
    keep_tiny_cost(made, tmp_path / "cache", LAYER)
    yield made
    torch.set_num_threads(before)


def run(model, variant, **more):
    return decode(model, [5, 6, 7], variant, max_new_tokens=NEW, end_tokens=(), **more)


# -- variants --------------------------------------------------------------------------------------


def test_baselines_leave_where_they_say(model, monkeypatch) -> None:
    layers = {}
    trace = AdaptiveDecoding.loop

    def keeping(self, **settings):
        loop = trace(self, **settings)
        layers["loop"] = loop
        return loop

    monkeypatch.setattr(AdaptiveDecoding, "loop", keeping)
    for variant in baselines(model, [0.5]):
        answer = run(model, variant)
        assert len(answer.tokens) == NEW and answer.report is None
        found = set(layers["loop"].trace.exit_layers[1:])
        reads = {k for k, _ in layers["loop"].batch.reads}
        if variant.kind == "dense":
            assert found == {LAYERS} and reads == set()
        elif variant.kind == "fixed":
            layer = int(variant.name.split()[-1])
            assert found == {layer, LAYERS}, "the top only for tokens that must catch up"
            assert reads == {model.exit_config.layers.index(layer)}, "other exits are not asked"
        elif variant.kind == "random":
            assert found == {1, 2, LAYERS}
    assert earliest(model).name == "fixed depth 1"


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_random_exits_leave_at_each_exit_with_the_probability_stated(probability) -> None:
    exit_policy, counts = RandomPolicy(probability, 3, seed=4), [0, 0, 0, 0]
    for _ in range(4000):
        exit_policy.on_step(0.0, 1)
        row = list(exit_policy.thresholds)
        assert sum(value == 0.0 for value in row) <= 1
        assert all(value in (0.0, math.inf) for value in row)
        counts[row.index(0.0) if 0.0 in row else 3] += 1
    stay = 1 - probability
    for k, share in enumerate((probability, probability * stay, probability * stay**2, stay**3)):
        assert counts[k] / 4000 == pytest.approx(share, abs=0.03)
    with pytest.raises(DeliberateError, match=r"probability 1.5 is outside"):
        RandomPolicy(1.5, 3)


def test_a_request_whose_budget_cannot_be_met_is_refused_without_decoding(model) -> None:
    assert run(model, budget_variant(0.01)) is None
    overheads = Overheads()
    answer = run(model, budget_variant(1e4), overheads=overheads)
    assert answer.report.met and answer.report.tokens == NEW
    assert len(overheads.steps) == NEW - 1 and len(overheads.requests) == 1
    assert overheads.per_token(NEW) > 0.0 and Overheads().per_token(NEW) == 0.0


def test_time_is_that_of_the_clock_given(model) -> None:
    readings = iter(range(10_000))
    answer = run(model, budget_variant(1e4), clock=lambda: float(next(readings)))
    assert answer.seconds >= NEW and answer.ms_per_token == 1e3 * answer.seconds / NEW


# -- what is made of them --------------------------------------------------------------------------


def report(speed: float = 1.0, guarded: int = 0) -> BudgetReport:
    return BudgetReport("b", True, 1.0, 10, 1.0, guarded, 0.5, speed)


def answers(*ms: float, tokens: int = 10, report_=None) -> list[Answer]:
    return [Answer(each * tokens / 1e3, tuple(range(tokens)), report_) for each in ms]


FIXED, DEEP, DENSE = Variant("f2", "fixed"), Variant("f4", "fixed"), Variant("dense", "dense")


def row(budget: float, ms: list[float], right: list[bool], least=lambda i, tokens: 0.0):
    """A budget against a shallow and a deep fixed depth, dense, and one setting of random exits."""
    n = len(ms)
    others = {
        FIXED: (answers(*[1.0] * n), [i % 2 == 0 for i in range(n)]),
        DEEP: (answers(*[2.0] * n), [i % 4 != 3 for i in range(n)]),
        DENSE: (answers(*[3.0] * n), [True] * n),
        Variant("r", "random"): (answers(*[1.0] * n), [False] * n),
    }
    variant = budget_variant(budget)
    return budget_row(variant, answers(*ms, report_=report()), right, others, least)


def test_shares_count_answers_within_the_budget_and_those_the_earliest_exit_could_have_given():
    found = row(2.0, [1.9, 2.1, 1.0, 2.5], [True] * 4, lambda i, _: [0.015, 0.015, 0.5, 0.5][i])
    assert (found.within, found.feasible, found.feasible_within) == (2, 2, 1)
    assert found.holds is False and found.point.ms_per_token == pytest.approx(1.875)
    assert row(2.0, [1.9, 1.9, 9.0, 9.0], [True] * 4, lambda i, _: 0.01 if i < 2 else 1.0).holds
    assert row(2.0, [1.9] * 4, [True] * 4, lambda *_: 1.0).holds is None


def test_ten_percent_of_slack_are_needed_for_a_request_to_count_as_feasible() -> None:
    allowed = 2.0e-3 * 10
    assert row(2.0, [1.0] * 4, [True] * 4, lambda *_: allowed / 1.099).feasible == 0
    assert row(2.0, [1.0] * 4, [True] * 4, lambda *_: allowed / 1.101).feasible == 4


def test_a_budget_is_held_against_the_best_fixed_depth_that_takes_no_more_time() -> None:
    found = row(2.6, [2.5] * 8, [True] * 6 + [False] * 2).against["fixed"]
    assert (found.setting, found.accuracy, found.ms_per_token) == ("f4", 0.75, 2.0)
    assert found.difference == 0.0 and found.interval.low < 0.0 < found.interval.high
    assert row(1.6, [1.5] * 8, [True] * 8).against["fixed"].setting == "f2"
    assert row(3.6, [3.5] * 8, [True] * 8).against["fixed"].setting == "dense"
    assert row(0.6, [0.5] * 8, [True] * 8).against["fixed"] is None


def test_random_exits_may_mix_two_settings_at_exactly_the_time_of_the_budget() -> None:
    found = row(2.1, [2.0] * 8, [True] * 4 + [False] * 4).against["random"]
    assert found.setting == "50% r, 50% dense" and found.ms_per_token == 2.0
    assert found.accuracy == pytest.approx(0.5) and found.difference == pytest.approx(0.0)
    beaten = row(2.1, [2.0] * 8, [False] * 8)
    assert not beaten.dominates and beaten.against["random"].difference == pytest.approx(-0.5)


def test_refused_requests_leave_the_baselines_of_their_line_too() -> None:
    given = answers(1.5, 1.5, 1.5, 1.5, report_=report())
    others = {FIXED: (answers(1.0, 1.0, 1.0, 1.0), [True, True, False, False])}
    variant = budget_variant(2.0)
    found = budget_row(
        variant, [None, None, *given[2:]], [False, False, True, True], others, lambda *_: 0.0
    )
    assert found.refused == 2 and found.point.requests == 2
    assert found.against["fixed"].accuracy == 0.0 and found.against["fixed"].difference == 1.0
    assert budget_row(variant, [None] * 4, [False] * 4, others, lambda *_: 0.0) is None


def test_a_point_averages_over_requests_not_over_tokens() -> None:
    mixed = [Answer(0.01, tuple(range(10))), Answer(0.3, tuple(range(100)))]
    found = point(DENSE, mixed, [True, False])
    assert found.ms_per_token == pytest.approx((1.0 + 3.0) / 2) and found.accuracy == 0.5
    assert found.tokens_per_request == 55


# -- a machine that becomes slower -----------------------------------------------------------------


def test_a_slowed_clock_counts_elapsed_time_twice_from_then_on() -> None:
    now = [10.0]
    clock = SlowedClock(lambda: now[0])
    now[0] += 1.0
    assert clock() == pytest.approx(1.0)
    now[0] += 0.5
    clock.slow(2.0)
    now[0] += 1.0
    assert clock() == pytest.approx(1.0 + 0.5 + 2.0)


def test_a_work_clock_gives_what_the_cost_model_prices(model) -> None:
    cost = model.guarantees.cost(model)
    clock = WorkClock(cost)
    for number in (1, 2):
        loop = AdaptiveDecoding(model, "threshold").loop(max_new_tokens=NEW, end_tokens=())
        loop.stopwatch.clock = clock
        clock.watch(loop, 3)
        before = clock()
        for _ in loop.run(torch.tensor([[5, 6, 7]])):
            pass
        work = Work((1, 2), loop.batch.passes, (1, 3), reads=loop.batch.reads)
        assert clock() - before == pytest.approx(predict_seconds(cost, work)), number


def test_the_stream_is_back_within_its_budget_after_the_machine_has_become_slower(model) -> None:
    machine = WorkClock(model.guarantees.cost(model))
    clock, budget = SlowedClock(machine), LatencyBudget(ms_per_token=4.6)
    changed = []

    def change() -> None:
        changed.append(clock())
        clock.slow(2.0)

    tokens = stream(
        model, [[5, 6, 7]], budget, before=100, after=100, clock=clock, change=change,
        max_new_tokens=60, end_tokens=(), machine=machine,
    )  # fmt: skip
    assert len(tokens) == 200 and len(changed) == 1
    found = judge(tokens, budget, before=100, factor=2.0, window=26, known=True)
    assert found.ms_before < 4.6 and tokens[-1].speed == pytest.approx(2.0, rel=0.05)
    assert found.planned_back is not None and found.planned_back <= 32
    assert found.ms_after <= 1.1 * 4.6, "deep exits would take twice what they did"


def token(ms: float, planned: float = 1.0) -> TokenTime:
    return TokenTime(ms / 1e3, planned / 1e3, 1.0, False)


def test_tokens_until_back_and_oscillation_are_those_of_the_stream() -> None:
    budget = LatencyBudget(ms_per_token=2.0)
    before, slow, fast, over = [token(1.5)] * 40, [token(3.0, 1.5)] * 10, token(1.9, 0.9), 2.5
    tokens = [*before, *slow, *[fast] * 60, *[token(over)] * 10, *[fast] * 20]
    found = judge(tokens, budget, before=40, factor=2.0, window=10, known=True)
    assert found.tokens_back == 10, "one slow token more, and the mean of ten is 2.01"
    assert found.planned_back == 10
    assert found.oscillation == pytest.approx(over / 2.0 - 1)
    assert found.planned_oscillation == 0.0 and found.recovered
    assert found.ms_before == pytest.approx(1.5)
    late = judge([*before, *slow * 5, *[fast] * 40], budget, before=40, factor=2.0, window=10,
                 known=False)  # fmt: skip
    assert late.tokens_back > 32 and not late.recovered and late.planned_back is None
    never = judge([*before, *slow * 5], budget, before=40, factor=2.0, window=10, known=False)
    assert never.tokens_back is None and not never.recovered


# -- the command -----------------------------------------------------------------------------------

SMALL = (
    "requests=4", "warmup=2", "task.steps=[1,2]", f"task.max_new_tokens={NEW}", "random=[0.5]",
    "budgets=[2e4,4e4]", "step.before=20", "step.after=40", "step.window=8",
)  # fmt: skip


def test_the_command_writes_figures_curve_and_a_page_without_references(
    model, checkpoint, calibration, tmp_path, capsys
) -> None:
    out = tmp_path / "out"
    run_benchmark(
        ["budget", f"model={checkpoint}", f"calibration={calibration}", f"out={out}", *SMALL]
    )
    assert {p.name for p in out.iterdir()} == {"budget.json", "budget.svg", "budget.html"}
    raw = json.loads((out / "budget.json").read_text())
    assert [b["ms"] for b in raw["sweep"]["budgets"]] == [2e4, 4e4] and raw["requests"] == 4
    assert all(b["within"] == 4 and b["holds"] for b in raw["sweep"]["budgets"])
    names = [one["name"] for one in raw["sweep"]["baselines"]]
    assert names == ["dense", "exact", "fixed depth 1", "fixed depth 2", "random exits 0.5"]
    assert 0 < raw["sweep"]["least_ms_per_token"] <= raw["sweep"]["dense_ms_per_token"]
    assert len(raw["steps"]["simulated"]["ms"]) == 60
    page = (out / "budget.html").read_text()
    assert "://" not in page and "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert (out / "budget.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    shown = capsys.readouterr().out
    assert "controller and policy take" in shown and "budget.html" in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budgets=1", "budgets=1 must be a whole number of at least 2"),
        ("budgets=[]", "budgets=.. is empty"),
        ("budgets=[0]", "ms_per_token = 0"),
        ("requests=0", "requests=0"),
        ("random=[1.0]", "probability 1.0"),
        ("clock=moon", "clock=moon"),
        ("step.factor=1", "step.factor=1"),
        ("step.window=500", "step.window=500 exceeds step.after=400"),
        ("step.noise=-1", "step.noise=-1"),
        ("request=3", "did you mean"),
    ],
)
def test_an_impossible_setting_is_named_before_anything_is_loaded(override, message) -> None:
    with pytest.raises(DeliberateError, match=message):
        budget_sweep.main([override])


def test_without_calibration_the_sweep_says_how_to_get_one(checkpoint, tmp_path) -> None:
    with pytest.raises(DeliberateError, match="run `deliberate calibrate"):
        run_benchmark(["budget", f"model={checkpoint}", f"out={tmp_path / 'o'}", *SMALL])
    assert not (tmp_path / "o").exists()


def test_bench_names_what_it_can_measure() -> None:
    with pytest.raises(DeliberateError, match=r"'speed' is unknown: one of .*budget"):
        run_benchmark(["speed"])
