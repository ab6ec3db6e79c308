"""The engine: requests come and go, and each gets what it would get alone."""

from __future__ import annotations

import dataclasses
import inspect
import random
import threading

import pytest
import torch
from gate_cases import BAND, shaken
from mixed_requests import SPECS, Unsteady, alone, check_same, draw_request, drive
from simulated_machine import calibrate
from tiny_calibration import use_tiny_cost
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.modeling.deliberation_gate import GateConfig
from deliberate.utils.errors import DeliberateError


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    model = AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])
    shaken(model.attach_gate(GateConfig(rounds=2, think_below=BAND, width=24, heads=2)))
    return model


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


@pytest.mark.parametrize("seed", range(2))
def test_scarce_blocks_change_when_a_request_is_decoded_but_not_what_it_gets(llama, seed):
    requests = [draw_request(5000 + 1000 * seed + one, longest=30) for one in range(50)]
    cache = llama.backbone.new_block_cache(16, block_size=4, max_rows=6)
    scheduler = Scheduler(SchedulerSettings(max_running=6, prefill_tokens=9, block_tokens=4))
    engine = llama.engine(max_running=6, cache=cache, scheduler=scheduler)
    results = drive(engine, requests, seed, aborts=0.01)
    assert check_same(llama, results, {}) > 30
    cache.check()
    stats = engine.stats()
    assert stats.preempted > 3
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, 16)


class Wandering:
    """A clock that gains a random time at each reading: sometimes little, sometimes much."""

    def __init__(self, seed: int) -> None:
        self._dice, self._now = random.Random(seed), 0.0

    def __call__(self) -> float:
        self._now += self._dice.choice([1e-5, 1e-4, 1e-3])
        return self._now


def test_a_thousand_requests_on_the_fast_executor(monkeypatch):
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    shaken(model.attach_gate(GateConfig(rounds=2, think_below=BAND, width=24, heads=2)))
    calibrate(model)
    use_tiny_cost(monkeypatch, model, 1e-5)
    kinds = [0, 1, 2, 4, 5, 8]  # by the C++ kernels each token is computed alike in every pass
    different = []
    for seed in range(120):
        spec = DecodingSpec(gate=seed % 4 == 0, **SPECS[kinds[seed % len(kinds)]])
        request = dataclasses.replace(draw_request(seed, longest=12), spec=spec)
        if seed % 5 == 0:
            budget = {"ms_per_token": (4.0, 8.0, 16.0, 1e5)[seed % 4]}
            spec = DecodingSpec()  # with the gate, which the calibration is of
            request = dataclasses.replace(request, budget=budget, spec=spec)
        different.append(request)
    dice = random.Random(0)
    requests = [dice.choice(different) for _ in range(1000)]
    scheduler = Unsteady(0, 0.05, max_running=12, prefill_tokens=40, idle_prefill_tokens=80)
    engine = model.engine(max_running=12, scheduler=scheduler, clock=Wandering(0))
    results = drive(engine, requests, 0, aborts=0.1)
    assert check_same(model, results, {}) > 800
    depths = [
        layer
        for request, _, _, layers, _ in results.values()
        if request.budget
        for layer in layers or ()
    ]
    assert min(map(depths.count, (1, 2, 4))) > 10
    stats = engine.stats()
    assert stats.added == 1000 and stats.preempted > 20 and stats.aborted > 20
    assert stats.finished + stats.aborted == 1000
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, 12)
    assert stats.tokens_per_second > 0 and 0 < stats.depth <= 1


def test_requests_behind_one_prompt_share_its_blocks(llama):
    prompt = random_ids(40, seed=1)[0].tolist()
    requests = [
        Request([*prompt, token], 6, spec=DecodingSpec(gate=False, fidelity="dense"), end_tokens=())
        for token in range(8)
    ]
    cache = llama.backbone.new_block_cache(64, block_size=4, max_rows=4)
    engine = llama.engine(max_running=4, cache=cache)
    results = drive(engine, requests, 0)
    assert check_same(llama, results, {}) == 8
    assert engine.stats().prefilled < 41 + 7 * 8  # 40 of 41 tokens of each are in blocks already


def test_with_and_without_a_gate_requests_behind_one_prompt_share_passes_and_not_states(llama):
    prompt = random_ids(24, seed=2)[0].tolist()
    requests = [
        Request([*prompt, n], 12, DecodingSpec(fidelity=kind, gate=gate), end_tokens=())
        for kind in ("dense", "threshold")
        for n, gate in enumerate((False, True, True, False))
    ]
    cache = llama.backbone.new_block_cache(64, block_size=4, max_rows=5)
    engine = llama.engine(max_running=5, cache=cache)
    numbers = [engine.add(request) for request in requests]
    traces = {}
    while engine.unfinished:
        traces |= {one.id: one.trace for one in engine.step() if one.trace is not None}
    for number, request in zip(numbers, requests, strict=True):
        assert traces[number].tokens == alone(llama, request)[0]
        assert bool(traces[number].rounds) is request.spec.gate
    # All of each prompt with the gate; of the others what no earlier one has computed.
    assert engine.stats().prefilled >= 4 * 25


def test_threads_add_and_abort_while_another_steps(llama):
    wanted = [draw_request(9000 + one) for one in range(32)]
    engine = llama.engine(max_running=4)
    numbers: dict[int, Request] = {}
    lock = threading.Lock()

    def add(own: list[Request]) -> None:
        for request in own:
            number = engine.add(request)
            with lock:
                numbers[number] = request

    threads = [threading.Thread(target=add, args=(wanted[n::8],)) for n in range(8)]
    made: dict[int, list[int]] = {}
    for thread in threads:
        thread.start()
    while engine.unfinished or any(thread.is_alive() for thread in threads):
        for output in engine.step():
            made.setdefault(output.id, []).extend(output.tokens)
    for number, request in numbers.items():
        assert made[number] == alone(llama, request)[0]


def test_a_stop_function_ends_an_answer_at_the_token_where_it_holds(llama):
    spec = DecodingSpec(gate=False, fidelity="exact", thresholds=0.013, online=False)
    whole = alone(llama, Request(random_ids(5)[0], 20, spec=spec, end_tokens=()))[0]
    shown: list[list[int]] = []

    def stop(tokens) -> bool:
        shown.append(list(tokens))
        return len(tokens) == 7

    engine = llama.engine()
    number = engine.add(Request(random_ids(5)[0], 20, spec=spec, end_tokens=(), stop=stop))
    results = []
    while engine.unfinished:
        results += engine.step()
    assert [token for output in results for token in output.tokens] == whole[:7]
    assert shown == [whole[: n + 1] for n in range(7)]
    assert results[-1].id == number and results[-1].finished == "stop"
    assert engine.stats().running == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prompt_ids": [1, 500]}, "token id 500 has no embedding: the model has 97"),
        ({"prompt_ids": "text"}, "token ids are needed"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be"),
        ({"deadline": float("nan")}, "deadline nan must be"),
        ({"spec": DecodingSpec(fidelity="exact", draft_tokens=3)}, "draft_tokens=3"),
        ({"stop": 3}, "stop=3 cannot be called"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(llama, changes, said):
    engine = llama.engine()
    with pytest.raises(DeliberateError, match=said):
        engine.add(Request(**({"prompt_ids": [1, 2], "max_new_tokens": 4} | changes)))
    assert engine.unfinished == 0 and engine.step() == []


def test_a_request_that_could_never_fit_is_refused(llama):
    cache = llama.backbone.new_block_cache(4, block_size=4, max_rows=2)
    engine = llama.engine(max_running=2, cache=cache)
    with pytest.raises(DeliberateError, match="take 5 blocks and the cache has 4"):
        engine.add(Request([1] * 10, 8, spec=DecodingSpec(gate=False)))


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_a_lone_request_takes_several_steps_in_one_call(fidelity):
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    thresholds = None if fidelity == "dense" else 0.03
    spec = DecodingSpec(gate=False, fidelity=fidelity, thresholds=thresholds, online=False)
    wanted = Request(random_ids(6)[0], 40, spec=spec, end_tokens=())
    engine = model.engine(max_running=3)
    brief = dataclasses.replace(wanted, max_new_tokens=1)
    engine.add(brief)  # has the first row, so that the other gets the second
    number = engine.add(wanted)
    made = []
    while engine.unfinished:
        made += [token for one in engine.step() if one.id == number for token in one.tokens]
    assert made == alone(model, wanted)[0]
    multi_step = model.backbone.multi_step(None)
    rows = multi_step is not None and "row" in inspect.signature(multi_step.decode).parameters
    if fidelity == "dense" and rows:
        assert engine.stats().steps < 20


def test_a_stock_models_exact_requests_look_their_drafts_up():
    model = AdaptiveModel(tiny_model("llama", layers=4), [1, 2])
    spec = DecodingSpec(gate=False, fidelity="exact")
    requests = [Request([5, 6, 7, 8] * (3 + one), 40, spec=spec, end_tokens=()) for one in range(3)]
    engine = model.engine(max_running=2)
    numbers = [engine.add(request) for request in requests]
    traces = {}
    while engine.unfinished:
        traces |= {one.id: one.trace for one in engine.step() if one.trace is not None}
    for number, request in zip(numbers, requests, strict=True):
        assert traces[number].tokens == alone(model, request)[0]
    assert traces[numbers[2]].drafted > 0


def test_the_draft_planner_is_told_of_decoding_and_not_of_prefill(llama, monkeypatch):
    now = [0.0]
    engine = llama.engine(max_running=2, clock=lambda: now[0])
    run = engine._prefill.run

    def slow(parts):
        now[0] += 100.0
        return run(parts)

    monkeypatch.setattr(engine._prefill, "run", slow)
    told = []
    for number in range(3):
        spec = DecodingSpec(fidelity="exact", thresholds=0.05, gate=False)
        engine.add(Request([5, 6, 7 + number], 6, spec=spec, end_tokens=()))
    planner = next(iter(engine._waiting.values())).sequence.planner
    for running in (1, 2):
        load = planner.of_load(running)
        monkeypatch.setattr(load, "progress", lambda *told_of: told.append(told_of))
    while engine.unfinished:
        engine.step()
        now[0] += 1.0
    assert now[0] > 200 and max(seconds for seconds, _ in told) == 0.0
    assert sum(tokens for _, tokens in told) == 3 * (6 - 1)
