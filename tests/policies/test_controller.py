"""The latency controller on a simulated machine: budgets held, slowdowns met, guard and bounds."""

from __future__ import annotations

import math
import random

import pytest
from controllers import COST, LEAST, controller, family, mean
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_plant import Plant, Table

from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetController, ControllerSettings
from deliberate.policies.lengths import LengthPredictor

# -- budgets are held ------------------------------------------------------------------------------


@pytest.mark.parametrize("metered", [True, False])
@pytest.mark.parametrize("ms", [0.8, 1.1, 1.5])
def test_a_mean_per_token_is_held_by_at_least_95_percent_of_responses(ms, metered):
    held = share_held(LatencyBudget(ms_per_token=ms), metered)
    assert mean(held) >= 0.95


@pytest.mark.parametrize("ms", [60.0, 80.0, 110.0])
def test_a_deadline_is_held_by_at_least_95_percent_of_responses(ms):
    assert mean(share_held(LatencyBudget(deadline_ms=ms), True)) >= 0.95


def share_held(budget: LatencyBudget, metered: bool) -> list[bool]:
    """Of responses of 30 to 110 tokens with 10 % slack over the least, after ten to learn from."""
    plant = Plant(COST, noise=0.15, seed=7)
    exit_policy = controller(budget)
    generator = random.Random(3)
    held = []
    for count in range(140):
        tokens = min(110, max(30, int(generator.gauss(70, 15))))
        plant.respond(exit_policy, tokens, metered=metered)
        report = exit_policy.end(plant.now, tokens)
        least = COST.prompt_seconds(40) + (tokens - 1) * LEAST
        if count >= 10 and 1.1 * least <= budget.allowed_seconds(tokens):
            held.append(report.met)
    assert len(held) > 30
    return held


def test_a_looser_budget_buys_depth():
    chosen = []
    for ms in (0.7, 1.0, 1.4, 3.0):
        plant, exit_policy = Plant(COST, seed=2), controller(LatencyBudget(ms_per_token=ms))
        plant.respond(exit_policy, 200)
        chosen.append(mean(exit_policy.chosen))
    assert chosen == sorted(chosen)
    assert chosen[-1] == pytest.approx(family()[1][-1]), "a budget beyond dense is spent on dense"


def test_a_text_harder_than_the_table_expects_is_paid_for_with_the_price():
    budget = LatencyBudget(ms_per_token=1.2)
    plant, exit_policy = Plant(COST, hard=2.0, noise=0.1, seed=1), controller(budget)
    for _ in range(4):
        plant.respond(exit_policy, 300, limit=400)
        report = exit_policy.end(plant.now, 300)
    assert report.met and exit_policy.mix > 1.1
    exit_policy.chosen.clear()
    fresh = controller(budget)
    for one in (exit_policy, fresh):
        Plant(COST, hard=2.0, seed=2).respond(one, 20, limit=400)
    assert mean(exit_policy.chosen) < 0.9 * mean(fresh.chosen), (
        "the next response starts from there"
    )
    assert report.ms_per_token > 0.85 * 1.2, "the budget is used, not only kept"


# -- a machine that becomes slower -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_machine_twice_as_slow_is_back_within_budget_in_32_tokens_without_oscillation(seed):
    budget, step = 1.4, 300
    plant = Plant(COST, lambda token: 2.0 if token >= step else 1.0, noise=0.1, seed=seed)
    exit_policy = controller(LatencyBudget(ms_per_token=budget))
    plant.respond(exit_policy, 700, limit=1024)
    real = [2e3 * seconds for seconds in exit_policy.chosen]  # ms per token on the slow machine
    settled = real[step + 32 :]
    assert max(settled) <= 1.1 * budget
    assert min(settled) >= 0.85 * budget, "the debt is paid back, and no more"
    taken = [1e3 * seconds for seconds in plant.step_seconds[1:]]
    assert mean(taken[step + 32 : step + 96]) <= budget
    assert mean(taken) <= budget


def test_a_machine_that_recovers_is_used_again_at_once():
    plant = Plant(COST, lambda token: 2.0 if 200 <= token < 300 else 1.0, noise=0.1, seed=4)
    exit_policy = controller(LatencyBudget(ms_per_token=1.4))
    plant.respond(exit_policy, 700, limit=1024)
    assert mean(exit_policy.chosen[350:]) == pytest.approx(1.4e-3, rel=0.1)


def test_a_stretch_that_nothing_could_have_kept_is_let_go():
    """Eight times slower for 150 tokens: the rest cannot repay it, so it is not made worse."""
    plant = Plant(COST, lambda token: 8.0 if 100 <= token < 250 else 1.0, seed=5)
    exit_policy = controller(LatencyBudget(ms_per_token=1.2))
    plant.respond(exit_policy, 900, limit=1000)
    assert set(exit_policy.chosen[150:250]) == {LEAST}, "while it lasts nothing else is fast enough"
    assert mean(exit_policy.chosen[250 + 32 :][:40]) > 0.9e-3
    assert mean(exit_policy.chosen[700:]) > 0.9e-3


def stalled(ms: float, stall: float) -> tuple[list[float], list[float], list[float]]:
    """Choices with and without one stall of so many seconds at token 100, and the seconds taken."""
    pacers = [controller(LatencyBudget(ms_per_token=ms)) for _ in range(2)]
    plants = [Plant(COST, noise=0.05, seed=6) for _ in range(2)]
    for exit_policy, plant, seconds in zip(pacers, plants, (stall, 0.0), strict=True):
        plant.slowdown = lambda token, seconds=seconds: 1.0 + (token == 100) * seconds / 1.5e-3
        plant.respond(exit_policy, 1200, limit=2000)
    return pacers[0].chosen, pacers[1].chosen, plants[0].step_seconds


@pytest.mark.parametrize("ms", [1.0, 1.4, 1.8])
def test_one_stall_beyond_repair_is_forgotten_within_64_tokens(ms):
    after, before, _ = stalled(ms, 5.0)
    assert mean(after[164:300]) > 0.93 * mean(before[164:300])


@pytest.mark.parametrize("stall", [0.5, 5.0])
def test_a_stall_does_not_take_from_a_budget_that_leaves_room_for_full_depth(stall):
    after, before, _ = stalled(3.0, stall)
    assert after[101:] == before[101:] == [family()[1][-1]] * len(after[101:])


def test_a_stall_that_the_rest_can_repay_is_repaid_and_the_budget_met():
    _, _, seconds = stalled(1.4, 0.3)
    assert mean(seconds) < 1.4e-3


def test_a_price_that_a_higher_one_undercuts_is_never_taken():
    """Exits whose evaluation costs more than they save: full depth is the fastest of all."""
    table = Table((1.0, 2.0, 3.0, math.inf), ((0.1,), (0.5,), (0.9,), (math.inf,)))
    for ms in (10, 42, 43.5, 45, 55, 100):
        exit_policy = BudgetController(
            LatencyBudget(ms_per_token=ms), table, [0.055, 0.060, 0.065, 0.043], least=0.043
        )
        exit_policy.begin(0.0, 3, 500)
        now, taken = 0.0, set()
        for token in range(1, 200):
            taken.add(tuple(exit_policy.thresholds(now, token)))
            now += 0.043
        assert taken == {(math.inf,)}, ms


def test_full_depth_is_taken_wherever_it_fits_however_hard_the_text_was():
    table = Table((1.0, 2.0, math.inf), ((0.1,), (0.5,), (math.inf,)))
    exit_policy = BudgetController(LatencyBudget(ms_per_token=45), table, [0.020, 0.030, 0.043])
    assert exit_policy.headroom > 1 - 43 / 45, "the headroom for texts would leave no room for it"
    exit_policy._text = 1.5
    exit_policy.begin(0.0, 3, 500)
    now, taken = 0.0, []
    for token in range(1, 200):
        taken.append(tuple(exit_policy.thresholds(now, token)))
        now += 0.043
    assert set(taken) == {(math.inf,)} and exit_policy.end(now, 199).met


def test_the_guard_closes_sooner_on_a_text_that_takes_more_work_than_the_table_says():
    """A meter that counts 1.4 times the work expected of the lambdas taken."""

    class Meter:
        total = 0.0

        def seconds(self) -> float:
            return self.total

    guarded = []
    for factor in (1.0, 1.4):
        exit_policy, meter, now = controller(LatencyBudget(ms_per_token=0.9)), Meter(), 0.0
        exit_policy.begin(now, 5, 400)
        exit_policy.watch(meter)
        for token in range(1, 300):
            exit_policy.thresholds(now, token)
            step = factor * exit_policy._times.expected[exit_policy._index]
            now, meter.total = now + step, meter.total + step
        hard = exit_policy.mix
        exit_policy.budget = LatencyBudget(deadline_ms=1e3 * (now + 1.3 * LEAST * 100))
        exit_policy.thresholds(now, 300)
        guarded.append(exit_policy.guarding)
    assert hard > 1.2 and guarded == [False, True]


def test_one_slow_step_is_not_taken_for_a_slow_machine():
    plant = Plant(COST, lambda token: 30.0 if token == 200 else 1.0, seed=6)
    exit_policy = controller(LatencyBudget(ms_per_token=1.4))
    before = Plant(COST, seed=6)
    undisturbed = controller(LatencyBudget(ms_per_token=1.4))
    plant.respond(exit_policy, 204, limit=1024)
    before.respond(undisturbed, 204, limit=1024)
    assert exit_policy.speed == pytest.approx(undisturbed.speed, rel=0.01)


def test_stalls_that_a_median_does_not_see_are_paid_for_too():
    """Another process takes the core at every twentieth step: 1.7 times slower in the mean."""
    plant = Plant(COST, lambda token: 15.0 if token % 20 == 0 else 1.0, seed=9)
    exit_policy = controller(LatencyBudget(ms_per_token=1.5))
    met = []
    for _ in range(40):
        plant.respond(exit_policy, 100)
        met.append(exit_policy.end(plant.now, 100).met)
    assert exit_policy.speed == pytest.approx(1.0, abs=0.05) and exit_policy.mix > 1.3
    assert mean(met[10:]) >= 0.9


def test_a_miss_raises_the_headroom_and_meeting_lowers_it_but_a_hopeless_budget_does_neither():
    exit_policy = controller(LatencyBudget(ms_per_token=1.0))
    before = exit_policy.headroom
    exit_policy.begin(0.0, 5, 100)
    assert not exit_policy.end(0.11, 100).met and exit_policy.headroom > before
    before = exit_policy.headroom
    exit_policy.begin(0.0, 5, 100)
    assert exit_policy.end(0.09, 100).met and 0 < before - exit_policy.headroom < 0.01
    hopeless = controller(LatencyBudget(ms_per_token=0.5))
    before = hopeless.headroom
    hopeless.begin(0.0, 5, 100)
    assert not hopeless.end(0.11, 100).met and hopeless.headroom == before


# -- the guard -------------------------------------------------------------------------------------


@given(
    deadline=st.floats(1, 1000),
    spent=st.floats(0, 2),
    tokens=st.integers(1, 200),
    history=st.lists(st.integers(1, 200), max_size=12),
)
@settings(deadline=None)
def test_near_the_deadline_the_earliest_exit_is_taken_whatever_came_before(
    deadline, spent, tokens, history
):
    exit_policy = controller(LatencyBudget(deadline_ms=deadline), lengths=LengthPredictor(history))
    exit_policy.begin(100.0, 10, 256)
    now = 100.0 + spent * deadline / 1e3
    thresholds = exit_policy.thresholds(now, tokens)
    left = deadline / 1e3 * (1 - spent)
    share = ControllerSettings().length_share
    needed = LEAST * exit_policy.lengths.quantile(tokens, 256, share)
    if left <= needed:
        assert thresholds == (0.0, 0.0, 0.0) and exit_policy.guarding and exit_policy.lambda_ == 0.0
    if left > 1.2 * needed:
        assert not exit_policy.guarding
    assert exit_policy.end(now, tokens).met == (now - 100.0 <= deadline / 1e3)


def test_once_the_deadline_has_passed_every_token_takes_the_earliest_exit():
    plant, exit_policy = Plant(COST, seed=1), controller(LatencyBudget(deadline_ms=30))
    plant.respond(exit_policy, 120)
    assert set(exit_policy.chosen[60:]) == {LEAST}
    report = exit_policy.end(plant.now, 120)
    assert not report.met and report.guarded >= 59
