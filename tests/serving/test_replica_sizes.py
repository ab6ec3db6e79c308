"""How many replicas, and how many requests each: from the cost model and the predicted wait."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from warm_costs import warm_cost_model

from deliberate.serving.scale.autoscaling import (
    FleetLoad,
    PredictedWaitPolicy,
    fleet_load,
    predicted_wait,
    waiting_probability,
    wanted_replicas,
)
from deliberate.serving.scale.replica_sizes import answer_seconds, replica_sizes
from deliberate.utils.errors import DeliberateError

loads = st.builds(
    FleetLoad,
    arrivals=st.floats(0.0, 500.0),
    service_seconds=st.floats(1e-3, 20.0),
    slots=st.integers(1, 16),
    queued=st.floats(0.0, 1000.0),
)


def test_the_share_that_waits_is_the_textbooks() -> None:
    # One server: C = rho. Two servers, offered load 1: C = 1/3 (Gross et al., chapter 2).
    assert waiting_probability(1, 0.7) == pytest.approx(0.7)
    assert waiting_probability(2, 1.0) == pytest.approx(1 / 3)


def test_the_predicted_wait_is_what_a_simulated_queue_shows() -> None:
    dice, rate, service, places = random.Random(1), 9.0, 1.0, 12
    free, now, waited = [0.0] * places, 0.0, []
    for _ in range(200_000):
        now += dice.expovariate(rate)
        soonest = min(free)
        begin = max(now, soonest)
        waited.append(begin - now)
        free[free.index(soonest)] = begin + dice.expovariate(1 / service)
    load = FleetLoad(rate, service, 4)
    assert predicted_wait(load, 3) == pytest.approx(sum(waited) / len(waited), rel=0.1)


@given(loads, st.integers(1, 20))
def test_more_replicas_never_wait_longer(load, replicas) -> None:
    assert predicted_wait(load, replicas + 1) <= predicted_wait(load, replicas)


@given(loads, st.floats(0.01, 10.0), st.integers(1, 30))
def test_the_number_is_the_least_that_keeps_the_target(load, target, most) -> None:
    count = wanted_replicas(load, target=target, least=1, most=most)
    assert 1 <= count <= most
    assert count == most or predicted_wait(load, count) <= target
    assert count == 1 or predicted_wait(load, count - 1) > target


def test_an_idle_fleet_may_go_to_none_and_comes_back_with_work() -> None:
    idle = FleetLoad(0.0, 1.0, 4)
    assert wanted_replicas(idle, target=1.0, least=0, most=8) == 0
    assert wanted_replicas(FleetLoad(1.0, 1.0, 4), target=1.0, least=0, most=8) == 1
    assert predicted_wait(FleetLoad(1.0, 1.0, 4), 0) == math.inf


def context(reported, queued=0.0, target=2) -> SimpleNamespace:
    return SimpleNamespace(
        aggregated_metrics=reported,
        total_queued_requests=queued,
        target_num_replicas=target,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=10,
    )


def test_the_policy_follows_what_replicas_report() -> None:
    policy = PredictedWaitPolicy(target_wait=0.5)
    assert policy(context({}))[0] == 2, "nothing is known: as it is"
    busy = {
        "arrivals_per_second": {"a": 6.0, "b": 6.0},
        "service_seconds": {"a": 1.0, "b": 1.0},
        "slots": {"a": 4.0, "b": 4.0},
    }
    wanted, _ = policy(context(busy))
    assert wanted == wanted_replicas(FleetLoad(12.0, 1.0, 4), target=0.5, most=10) > 3
    assert policy(context(busy, queued=200.0))[0] > wanted
    quiet = busy | {"arrivals_per_second": {"a": 0.1, "b": 0.1}}
    assert policy(context(quiet))[0] == 1
    assert fleet_load({"service_seconds": [0.0], "slots": [4]}, 3.0) is None


def test_a_replica_is_sent_what_it_can_work_off_within_the_wait() -> None:
    cost = warm_cost_model(0.0)
    sizes = replica_sizes(cost, max_running=16, max_waiting=256, replicas=2, wait=0.2)
    rate = sizes.running / answer_seconds(cost, sizes.running, 128, 64)
    assert sizes.running < sizes.ongoing
    assert (sizes.ongoing - sizes.running) / rate <= 0.2
    assert sizes.queued == 2 * (256 - (sizes.ongoing - sizes.running))
    longer = replica_sizes(cost, max_running=16, max_waiting=256, replicas=2, wait=1.0)
    assert longer.ongoing > sizes.ongoing


def test_without_a_cost_model_sizes_are_those_of_the_settings() -> None:
    sizes = replica_sizes(None, max_running=8, max_waiting=10, replicas=3)
    assert (sizes.running, sizes.ongoing, sizes.queued) == (8, 16, 6)


@pytest.mark.parametrize("given", [{"max_running": 0}, {"replicas": 0}, {"answer": 0}])
def test_sizes_of_nothing_are_refused(given) -> None:
    with pytest.raises(DeliberateError, match=next(iter(given))):
        replica_sizes(None, **({"max_running": 8, "max_waiting": 8, "replicas": 1} | given))
