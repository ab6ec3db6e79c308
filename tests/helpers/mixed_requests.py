"""Requests of mixed settings in an engine, and what each of them gets alone."""

from __future__ import annotations

import dataclasses
import math
import random

import torch
from tiny_models import random_ids

from deliberate.api.loop_builder import Extent, Hooks, build_loop
from deliberate.api.model import AdaptiveModel
from deliberate.engine.engine import Engine
from deliberate.engine.exit_policy import ExitPolicy
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
        spec=DecodingSpec(gate=dice.random() < 0.5, **SPECS[seed % len(SPECS)]),
        sampling=TokenChooser(sample=True, seed=seed) if sampled else None,
        end_tokens=dice.sample(range(97), dice.choice([0, 0, 4])),
        priority=dice.choice([0, 0, 0, 1, 5]),
    )


class Replayed(ExitPolicy):
    """The thresholds that a request's controller took before each token."""

    def __init__(self, taken: dict[int, tuple], exits: int) -> None:
        self.thresholds, self._taken = (math.inf,) * exits, taken

    def on_step(self, now: float, tokens: int) -> None:
        # An aborted request has none for the tokens that it did not make.
        if tokens in self._taken:
            self.thresholds, self.gate_threshold = self._taken[tokens]


def taken_thresholds(engine: Engine, number: int) -> dict[int, tuple]:
    """Exit and gate thresholds by number of tokens, of a request that was just added; they come as
    its controller takes them. Stays empty where a request has none."""
    policy, taken = engine._waiting[number].sequence.policy, {}
    on_step = policy.on_step

    def noted(now: float, tokens: int) -> None:
        on_step(now, tokens)
        taken[tokens] = (policy.thresholds, policy.gate_threshold)

    if not policy.constant:
        policy.on_step = noted
    return taken


def alone(
    model: AdaptiveModel, request: Request, taken: dict[int, tuple] | None = None
) -> tuple[list[int], str, list[int]]:
    """Tokens, reason of the end and layers of a request that is decoded by itself.

    One with a budget is decoded with the thresholds `taken` by its controller; without any, at
    full depth, since its budget allowed it.
    """
    hooks, spec = Hooks(), request.spec
    if request.budget is not None:
        spec = dataclasses.replace(spec, fidelity="threshold" if taken else "dense")
        exits = len(model.exit_config.layers)
        hooks = Hooks(exit_policy=Replayed(taken, exits)) if taken else hooks
    extent = Extent(
        request.max_new_tokens,
        request.end_tokens or (),
        prompt_tokens=len(request.prompt_ids),
        chooser=request.sampling,
    )
    loop = build_loop(model, spec, hooks, None, extent)
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
            if victim in plan.preempt:
                return plan
            plan.preempt.append(victim)
            for ids in (plan.shallow, plan.deep):
                ids[:] = [one for one in ids if one != victim]
            plan.prefill = [one for one in plan.prefill if one[0] != victim]
        return plan


def drive(engine: Engine, requests: list[Request], seed: int, aborts: float = 0.0):
    """Adds requests at random steps, aborts some; the tokens and ends of the others."""
    dice = random.Random(seed)
    made: dict[int, list[int]] = {}
    told: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    numbers: dict[int, Request] = {}
    todo = list(requests)
    layers: dict[int, list[int]] = {}
    taken: dict[int, dict[int, tuple]] = {}
    while todo or engine.unfinished:
        for _ in range(dice.choice([0, 0, 1, 4])):
            if todo:
                request = todo.pop(0)
                number = engine.add(request)
                numbers[number] = request
                taken[number] = taken_thresholds(engine, number)
        if numbers and dice.random() < aborts:
            number = dice.choice(list(numbers))
            if number not in ended and engine.abort(number):
                ended[number] = "abort"
        for output in engine.step():
            assert ended.get(output.id) is None
            made.setdefault(output.id, []).extend(output.tokens)
            told.setdefault(output.id, []).extend(output.exit_layers)
            assert len(told[output.id]) == len(made[output.id])
            if output.finished is not None:
                ended[output.id] = output.finished
                assert output.trace.tokens == made[output.id]
                layers[output.id] = output.trace.exit_layers
                assert told[output.id] == layers[output.id]
    return {n: (numbers[n], made.get(n, []), ended[n], layers.get(n), taken[n]) for n in numbers}


def check_same(model: AdaptiveModel, results, known: dict[int, tuple]) -> int:
    """Every request that was not aborted got what it gets alone; how many."""
    compared = 0
    for request, tokens, end, layers, taken in results.values():
        key = id(request)
        if request.budget is not None:
            known[key] = alone(model, request, taken)
        elif key not in known:
            known[key] = alone(model, request)
        expected, finish, expected_layers = known[key]
        if end == "abort":
            assert tokens == expected[: len(tokens)]
            continue
        assert (tokens, end) == (expected, finish), request.spec.given()
        if request.spec.fidelity == "threshold" or taken:
            assert layers == expected_layers
        compared += 1
    return compared
