"""The latency controller on a simulated machine: budgets held, slowdowns met, guard and bounds."""

from __future__ import annotations

import dataclasses
import math
import random
import threading
from functools import cache

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from latency_plant import MAX_PENDING, Plant, Table, plant_cost, plant_table

from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetController, ControllerSettings
from deliberate.policies.lengths import LengthPredictor
from deliberate.utils.errors import DeliberateError

COST = plant_cost()
LEAST = COST.least_seconds_per_token(MAX_PENDING)


@cache
def family() -> tuple[Table, list[float]]:
    return plant_table(COST, 60)


class Watched(BudgetController):
    """Also notes the seconds per token that each choice stands for on the unchanged machine."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.chosen: list[float] = []

    def thresholds(self, now, tokens):
        answer = super().thresholds(now, tokens)
        table, expected = family()
        if self.guarding:
            self.chosen.append(LEAST)
        else:
            self.chosen.append(expected[table.lambdas.index(self.lambda_)])
        return answer


def controller(budget: LatencyBudget, **settings) -> Watched:
    table, expected = family()
    return Watched(budget, table, expected, least=LEAST, **settings)


def mean(values) -> float:
    return sum(values) / len(values)


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


# -- invariants ------------------------------------------------------------------------------------

timelines = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(1e-9, 1e3)),  # seconds until the next call
        st.integers(-3, 5),  # tokens made, fewer than none where drafts are taken back
    ),
    min_size=1,
    max_size=60,
)


@given(timeline=timelines, ms=st.floats(1e-3, 1e4), deadline=st.booleans())
@settings(deadline=None)
def test_whatever_the_clock_says_factors_stay_bounded_and_nothing_is_nan(timeline, ms, deadline):
    name = "deadline_ms" if deadline else "ms_per_token"
    exit_policy = controller(LatencyBudget(**{name: ms}))
    exit_policy.begin(0.0, 5, 64)
    now, tokens = 0.0, 0
    bound = ControllerSettings().bound * (1 + 1e-9)
    rows = {*family()[0].rows, (0.0, 0.0, 0.0)}
    for wait, made in timeline:
        now, tokens = now + wait, max(1, tokens + made)
        assert exit_policy.thresholds(now, tokens) in rows
        assert 1 / bound <= exit_policy.speed <= bound and 1 / bound <= exit_policy.mix <= bound
        assert math.isfinite(exit_policy.planned_seconds) and exit_policy.planned_seconds > 0
    assert not math.isnan(exit_policy.end(now, tokens).ms_per_token)


@given(
    timeline=timelines,
    ms=st.floats(0.01, 100),
    factor=st.floats(1, 20),
    deadline=st.booleans(),
)
@example(timeline=[(110.0, 0)], ms=89.0, factor=19.5, deadline=False)  # dropped by the smaller
@settings(deadline=None)
def test_after_the_same_past_a_larger_budget_never_takes_a_lower_price(
    timeline, ms, factor, deadline
):
    """The past is metered, so what was learnt of machine and text does not depend on the budget.

    But for debt beyond repair, which is dropped: the smaller budget is then missed anyway, while
    the larger one may still have something to save.
    """

    class Dropping(Watched):
        dropped = False

        def _repayable(self, pace, slow, remaining):
            before = self._debt
            left = super()._repayable(pace, slow, remaining)
            self.dropped = self.dropped or left < before
            return left

    class Meter:
        total = 0.0

        def seconds(self) -> float:
            return self.total

    name = "deadline_ms" if deadline else "ms_per_token"
    still = ControllerSettings(mix_tokens=1e12)  # the text's factor depends on lambdas taken
    lambdas = []
    for budget in (LatencyBudget(**{name: ms}), LatencyBudget(**{name: ms * factor})):
        table, expected = family()
        exit_policy = Dropping(budget, table, expected, least=LEAST, settings=still)
        meter = Meter()
        exit_policy.begin(0.0, 5, 64)
        exit_policy.watch(meter)
        now, tokens, taken = 0.0, 0, []
        for wait, made in timeline:
            now, tokens, meter.total = now + wait, max(1, tokens + made), meter.total + 1e-3
            exit_policy.thresholds(now, tokens)
            taken.append(-1.0 if exit_policy.guarding else exit_policy.lambda_)
        assume(not exit_policy.dropped)
        lambdas.append(taken)
    assert all(low <= high for low, high in zip(*lambdas, strict=True))


def test_the_machines_factor_carries_over_and_the_debt_does_not():
    plant = Plant(COST, lambda _: 2.0, seed=3)
    exit_policy = controller(LatencyBudget(ms_per_token=2.0))
    plant.respond(exit_policy, 150)
    first = mean(exit_policy.chosen[:10])
    exit_policy.end(plant.now, 150)
    exit_policy.chosen.clear()
    plant.respond(exit_policy, 150)
    assert exit_policy.speed == pytest.approx(2.0, rel=0.05)
    assert mean(exit_policy.chosen[:10]) < 0.8 * first


def test_the_same_times_give_the_same_choices():
    def run() -> list[float]:
        plant, exit_policy = (
            Plant(COST, noise=0.2, seed=8),
            controller(LatencyBudget(ms_per_token=1.0)),
        )
        for _ in range(3):
            plant.respond(exit_policy, 60)
            exit_policy.end(plant.now, 60)
        return exit_policy.chosen

    assert run() == run()


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lambdas", "expected"),
    [
        ((1.0, 2.0), [1.0]),
        ((2.0, 1.0), [1.0, 2.0]),
        ((-1.0, 1.0), [1.0, 2.0]),
        ((1.0, 2.0), [1.0, math.nan]),
        ((1.0, 2.0), [0.0, 1.0]),
        ((), []),
    ],
)
def test_tables_that_cannot_steer_are_one_line(lambdas, expected):
    table = Table(lambdas, ((0.5, 0.5, 0.5),) * len(lambdas))
    with pytest.raises(DeliberateError) as error:
        BudgetController(LatencyBudget(deadline_ms=1), table, expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ControllerSettings)])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(DeliberateError, match=name):
        ControllerSettings(**{name: value})


def test_a_dense_row_of_infinite_price_may_end_the_table():
    table = Table((0.0, math.inf), ((0.0,), (math.inf,)))
    exit_policy = BudgetController(LatencyBudget(ms_per_token=50), table, [1e-3, 4e-3])
    exit_policy.begin(0.0, 3, 50)
    assert exit_policy.thresholds(1e-3, 1) == (math.inf,) and math.isinf(exit_policy.lambda_)
    assert math.isfinite(exit_policy.planned_seconds)


# -- copies for responses that run at once ---------------------------------------------------------


def answered(own: BudgetController, plant: Plant, tokens: int = 60):
    plant.respond(own, tokens)
    return own.end(plant.now, tokens)


def state(one: BudgetController) -> tuple:
    return one.speed, one.mix, one.headroom, one._stall, tuple(one._blind), len(one.lengths)


def test_responses_one_after_the_other_learn_as_one_controller_does() -> None:
    budget = LatencyBudget(ms_per_token=1.3)
    single, shared = controller(budget), controller(budget)
    plants = [Plant(COST, noise=0.3, seed=5, slowdown=lambda _: 1.4) for _ in range(2)]
    for _ in range(6):
        answered(single, plants[0])
        own = shared.fork()
        answered(own, plants[1])
        shared.merge(own)
        assert state(shared) == state(single)
    assert plants[0].exits == plants[1].exits


def test_what_responses_at_the_same_time_learn_is_averaged_and_their_misses_add_up() -> None:
    shared = controller(LatencyBudget(ms_per_token=1.3))
    slow, fast = shared.fork(), shared.fork()
    before = shared.headroom
    missed = answered(slow, Plant(COST, seed=1, slowdown=lambda _: 1.6))
    met = answered(fast, Plant(COST, seed=1, slowdown=lambda _: 0.7))
    assert met.met and slow.speed > fast.speed
    shared.merge(slow)
    assert state(shared)[:2] == state(slow)[:2], "nothing else was learnt in between"
    shared.merge(fast)
    assert shared.speed == pytest.approx(math.sqrt(slow.speed * fast.speed))
    moves = (slow.headroom - before) + (fast.headroom - before)
    assert shared.headroom == pytest.approx(before + moves)
    assert len(shared.lengths) == 2 and missed.tokens == met.tokens == 60


def test_a_copy_leaves_the_original_as_it_is_until_it_is_merged() -> None:
    shared = controller(LatencyBudget(ms_per_token=1.3))
    kept = state(shared)[:5]
    for metered in (True, False):
        own = shared.fork()
        Plant(COST, seed=2, slowdown=lambda _: 2.0).respond(own, 60, metered=metered)
        assert own.speed > 1.2 and state(shared)[:5] == kept


def test_lengths_are_read_while_other_threads_add_to_them() -> None:
    predictor = LengthPredictor([5] * 10, capacity=64)
    stop = threading.Event()
    errors = []

    def read() -> None:
        while not stop.is_set():
            try:
                assert 1 <= predictor.mean(3, 400) <= 397
                assert 1 <= predictor.quantile(3, 400, 0.9) <= 397
            except Exception as error:
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for one in readers:
        one.start()
    for length in range(1, 400):
        predictor.observe(length)
    stop.set()
    for one in readers:
        one.join()
    assert not errors and len(predictor) == 64
