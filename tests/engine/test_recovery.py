"""Wherever a step fails, its requests go on afterwards with what each would have got."""

from __future__ import annotations

import random

import pytest
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.spec import DecodingSpec

SPECS = [
    {"fidelity": "dense"},
    {"fidelity": "exact", "thresholds": 0.013},
    {"fidelity": "threshold", "thresholds": 0.02},
    {"fidelity": "threshold", "thresholds": 0.03, "kv_mode": "propagate"},
    {"fidelity": "threshold", "thresholds": 0.03, "kv_mode": "skip"},
]


@pytest.fixture(scope="module")
def model():
    return AdaptiveModel(tiny_model("llama"), exits=(1, 2, 3))


def requests(seed: int, count: int = 5) -> list[Request]:
    return [
        Request(
            random_ids(3 + 4 * place, seed=seed + place)[0],
            12,
            spec=DecodingSpec(gate=False, **SPECS[place % len(SPECS)]),
            sampling=TokenChooser(sample=True, seed=place) if place % 2 else None,
            end_tokens=(),
        )
        for place in range(count)
    ]


def drained(engine, numbers, attempt=None) -> list[list[int]]:
    """The tokens of each request; `attempt` steps the engine."""
    made = {number: [] for number in numbers}
    while engine.unfinished:
        for output in (attempt or engine.step)():
            made[output.id] += output.tokens
    return [made[number] for number in numbers]


class Fault(RuntimeError):
    pass


def breaking(call, dice, share):
    """`call`, which fails now and then, before its work is done or after it."""

    def broken(*args, **kwargs):
        where = dice.random()
        if where < share / 2:
            raise Fault
        made = call(*args, **kwargs)
        if where < share:
            raise Fault
        return made

    return broken


@pytest.mark.parametrize("seed", range(6))
def test_a_step_that_fails_anywhere_changes_no_answer(model, monkeypatch, seed) -> None:
    wanted = model.engine(max_running=4)
    expected = drained(wanted, [wanted.add(one) for one in requests(seed)])
    engine, dice, failed = model.engine(max_running=4), random.Random(seed), 0
    for part, name in (
        (engine._runner, "run"),
        (engine._runner, "add_pending"),
        (engine._verifier, "predict"),
        (engine._verifier, "complete"),
        (engine._decode._exit_step, "evaluate"),
    ):
        monkeypatch.setattr(part, name, breaking(getattr(part, name), dice, 0.06))

    def attempt():
        nonlocal failed
        try:
            return engine.step()
        except Fault:
            failed += 1
            outputs, ran = engine.recover()
            assert ran and not engine.stats().running
            return outputs

    made = drained(engine, [engine.add(one) for one in requests(seed)], attempt)
    assert made == expected and failed > 3
    assert engine.stats().running == 0 and engine.stats().free_blocks == 4


def test_outputs_of_a_step_that_fails_at_its_end_are_not_lost(model, monkeypatch) -> None:
    engine = model.engine(max_running=4)
    numbers = [engine.add(one) for one in requests(3, 3)]
    last = engine._waiting[numbers[2]]
    whole, fails = last.output, [True]

    def output(now):
        if fails and last.sequence.records:
            fails.pop()
            raise Fault
        return whole(now)

    monkeypatch.setattr(last, "output", output)

    def attempt():
        try:
            return engine.step()
        except Fault:
            return engine.recover()[0]

    wanted = model.engine(max_running=4)
    expected = drained(wanted, [wanted.add(one) for one in requests(3, 3)])
    assert drained(engine, numbers, attempt) == expected and not fails


def test_what_is_set_aside_is_not_stepped_and_goes_on_where_it_was(model) -> None:
    wanted = model.engine()
    expected = drained(wanted, [wanted.add(one) for one in requests(7, 2)])
    engine = model.engine()
    first, second = (engine.add(one) for one in requests(7, 2))
    made = {first: [], second: []}
    for _ in range(4):
        for output in engine.step():
            made[output.id] += output.tokens
    engine.set_aside([first])
    assert engine.unfinished == 1
    while engine.unfinished:
        for output in engine.step():
            assert output.id == second
            made[output.id] += output.tokens
    engine.set_aside(None)
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    assert [made[first], made[second]] == expected


def test_a_request_that_is_set_aside_can_be_given_up(model) -> None:
    engine = model.engine()
    number = engine.add(requests(7, 1)[0])
    engine.set_aside([number])
    assert engine.abort(number) and not engine.abort(number)
    engine.set_aside(None)
    assert engine.unfinished == 0
