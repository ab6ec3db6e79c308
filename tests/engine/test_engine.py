"""The engine: requests come and go, and each gets what it would get alone."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.loop_builder import Extent, Hooks, build_loop
from deliberate.api.model import AdaptiveModel
from deliberate.engine.engine import Engine
from deliberate.engine.long_text_config import LongTextConfig
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.engine.step_plan import StepPlan

SPECS = [
    {"fidelity": "dense"},
    {"fidelity": "exact", "thresholds": 0.013, "online": False},
    {"fidelity": "exact", "thresholds": 0.05},
    {"fidelity": "exact", "thresholds": (0.2, 0.02, 0.013), "online": False},
    {"fidelity": "threshold", "thresholds": 0.02},
    {"fidelity": "threshold", "thresholds": 0.03, "max_pending": 3},
    {"fidelity": "threshold", "thresholds": 0.03, "kv_mode": "propagate"},
    {"fidelity": "threshold", "thresholds": 0.03, "kv_mode": "skip"},
    {"fidelity": "exact", "thresholds": 0.02, "long_text": LongTextConfig(window=4, threshold=4.0)},
]


def draw_request(seed: int, longest: int = 16) -> Request:
    """One of many: every setting differs from request to request."""
    dice = random.Random(seed)
    sampled = dice.random() < 0.4
    return Request(
        random_ids(dice.randint(1, 24), seed=seed)[0],
        max_new_tokens=dice.randint(1, longest),
        spec=DecodingSpec(gate=False, **SPECS[seed % len(SPECS)]),
        sampling=TokenChooser(sample=True, seed=seed) if sampled else None,
        end_tokens=dice.sample(range(97), dice.choice([0, 0, 4])),
        priority=dice.choice([0, 0, 0, 1, 5]),
    )


def alone(model: AdaptiveModel, request: Request) -> tuple[list[int], str, list[int]]:
    """Tokens, reason of the end and layers of a request that is decoded by itself."""
    extent = Extent(
        request.max_new_tokens,
        request.end_tokens or (),
        prompt_tokens=len(request.prompt_ids),
        chooser=request.sampling,
    )
    loop = build_loop(model, request.spec, Hooks(), None, extent)
    for _ in loop.run([torch.tensor(request.prompt_ids)]):
        pass
    return loop.trace.tokens, loop.trace.finish, loop.trace.exit_layers


class Unsteady(Scheduler):
    """Preempts at random, whatever the reason may be."""

    def __init__(self, seed: int, share: float, **settings) -> None:
        super().__init__(SchedulerSettings(**settings))
        self._dice, self._share = random.Random(seed), share

    def plan(self, now, waiting, running, free_blocks=None) -> StepPlan:
        plan = super().plan(now, waiting, running, free_blocks)
        if running and self._dice.random() < self._share:
            victim = self._dice.choice(running).id
            plan.preempt.append(victim)
            for ids in (plan.shallow, plan.deep):
                ids[:] = [one for one in ids if one != victim]
            plan.prefill = [one for one in plan.prefill if one[0] != victim]
        return plan


def drive(engine: Engine, requests: list[Request], seed: int, aborts: float = 0.0):
    """Adds requests at random steps, aborts some; the tokens and ends of the others."""
    dice = random.Random(seed)
    made: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    numbers: dict[int, Request] = {}
    todo = list(requests)
    layers: dict[int, list[int]] = {}
    while todo or engine.unfinished:
        for _ in range(dice.choice([0, 0, 1, 4])):
            if todo:
                request = todo.pop(0)
                numbers[engine.add(request)] = request
        if numbers and dice.random() < aborts:
            number = dice.choice(list(numbers))
            if number not in ended and engine.abort(number):
                ended[number] = "abort"
        for output in engine.step():
            assert ended.get(output.id) is None
            made.setdefault(output.id, []).extend(output.tokens)
            if output.finished is not None:
                ended[output.id] = output.finished
                assert output.trace.tokens == made[output.id]
                layers[output.id] = output.trace.exit_layers
    return {n: (numbers[n], made.get(n, []), ended[n], layers.get(n)) for n in numbers}


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


def check_same(model: AdaptiveModel, results, known: dict[int, tuple]) -> int:
    """Every request that was not aborted got what it gets alone; how many."""
    compared = 0
    for request, tokens, end, layers in results.values():
        key = id(request)
        if key not in known:
            known[key] = alone(model, request)
        expected, finish, expected_layers = known[key]
        if end == "abort":
            assert tokens == expected[: len(tokens)]
            continue
        assert (tokens, end) == (expected, finish), request.spec.given()
        if request.spec.fidelity == "threshold":
            assert layers == expected_layers
        compared += 1
    return compared


@pytest.mark.parametrize("seed", range(3))
def test_mixed_requests_that_come_and_go_get_what_each_gets_alone(llama, seed):
    requests = [draw_request(1000 * seed + one) for one in range(60)]
    scheduler = Unsteady(seed, 0.15, max_running=5, prefill_tokens=7, idle_prefill_tokens=19)
    engine = llama.engine(max_running=5, scheduler=scheduler)
    results = drive(engine, requests, seed, aborts=0.05)
    assert check_same(llama, results, {}) > 40
    stats = engine.stats()
    assert stats.preempted > 10 and stats.aborted > 0
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, 5)
