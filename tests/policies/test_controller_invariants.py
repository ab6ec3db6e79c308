"""What holds of a controller whatever is asked of it, what it refuses, and its copies."""

from __future__ import annotations

import dataclasses
import math
import threading

import pytest
from controllers import COST, LEAST, Watched, controller, family, mean
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from latency_plant import Plant, Table

from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetController, ControllerSettings
from deliberate.policies.lengths import LengthPredictor
from deliberate.utils.errors import DeliberateError

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
