"""Exact requests beside others in an engine: their drafts share calls, their outputs stay."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine import ngram_drafts
from deliberate.engine.engine import Engine
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.engine.proposed_drafts import ProposedDrafts
from deliberate.engine.request import Request
from deliberate.engine.sampler import TokenChooser
from deliberate.engine.scheduler import DeepSchedule, Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec

EXACT = DecodingSpec(gate=False, fidelity="exact", thresholds=0.02, online=False)
DENSE = DecodingSpec(gate=False, fidelity="dense")


@pytest.fixture(scope="module")
def fast() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])


def requests(count: int, spec: DecodingSpec = EXACT, **changes) -> list[Request]:
    return [
        Request(random_ids(4 + one, seed=one)[0], 30 + one, spec=spec, end_tokens=(), **changes)
        for one in range(count)
    ]


def served(engine: Engine, wanted: list[Request]) -> list[list[int]]:
    numbers = [engine.add(request) for request in wanted]
    made: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.unfinished:
        for one in engine.step():
            made[one.id] += one.tokens
    return [made[number] for number in numbers]


def dense(model: AdaptiveModel, wanted: list[Request]) -> list[list[int]]:
    engine = model.engine(max_running=1)
    return served(engine, [dataclasses.replace(one, spec=DENSE) for one in wanted])


def takes_rows(model: AdaptiveModel) -> bool:
    """Whether the executor drafts for several sequences in one call here."""
    return hasattr(model.backbone.multi_step(model.reader()), "draft_rows")


def test_drafts_of_several_requests_take_fewer_steps_than_passes(fast):
    wanted = requests(4)
    engine = fast.engine(max_running=4)
    assert served(engine, wanted) == dense(fast, wanted)
    stats = engine.stats()
    assert stats.passes[0] > stats.passes[1]
    if takes_rows(fast):
        assert stats.steps < 0.7 * stats.passes[0]


def test_every_pass_of_a_call_is_counted_for_the_sequences_that_it_served(fast):
    engine, traces = fast.engine(max_running=4), []
    for one in requests(4):
        engine.add(one)
    while engine.unfinished:
        traces += [one.trace for one in engine.step() if one.trace is not None]
    rows = engine.stats().rows
    for segment, layer in ((0, 0), (1, 1), (2, 3)):
        assert rows[segment] == sum(trace.layer_calls[layer] for trace in traces)
    # Each draft was one position of the first layer, and so was each token of full depth's.
    fed = sum(trace.drafted + len(trace.tokens) for trace in traces)
    assert sum(trace.layer_positions[0] for trace in traces) <= fed


def test_a_blocked_sequence_waits_as_long_as_is_allowed_and_no_longer(fast, monkeypatch):
    settings = SchedulerSettings(max_running=4, deep=DeepSchedule(fullness=1.0, max_wait=3, join=2))
    engine, waits = fast.engine(max_running=4, scheduler=Scheduler(settings)), []
    deep = engine._decode.deep

    def noted(rows):
        waits.extend(row.waited for row in rows)
        deep(rows)

    monkeypatch.setattr(engine._decode, "deep", noted)
    for one in requests(4):
        engine.add(one)
    while engine.unfinished:
        engine.step()
    assert max(waits) == 3


@pytest.mark.parametrize("block_size", [4, 16])
def test_drafts_of_a_call_stay_within_the_blocks_that_were_set_aside(fast, block_size):
    wanted = requests(4)
    blocks = 100 // block_size
    cache = fast.backbone_for(2).new_block_cache(blocks, block_size=block_size, max_rows=4)
    settings = SchedulerSettings(max_running=4, block_tokens=block_size)
    engine = fast.engine(max_running=4, cache=cache, scheduler=Scheduler(settings))
    assert served(engine, wanted) == dense(fast, wanted)
    cache.check()
    assert engine.stats().free_blocks == blocks


@pytest.mark.parametrize("blocks", [False, True])
def test_requests_that_look_their_drafts_up_share_passes_with_any_others(fast, blocks, monkeypatch):
    # Whatever they are worth, by times that a busy machine makes longer.
    monkeypatch.setattr(ngram_drafts, "affordable", lambda allowance, cost, count: count)
    monkeypatch.setattr(NgramDrafts, "_best", lambda self, most: most)
    monkeypatch.setattr(ProposedDrafts, "_lookup_pays", lambda self, share: True)
    spec = DecodingSpec(gate=False, fidelity="exact", lookup_tokens=4)
    wanted = [
        Request([5, 6, 7, 8] * (3 + one), 30 + one, spec=spec, end_tokens=()) for one in range(3)
    ]
    ends = dense(fast, wanted)[1][7:8]
    wanted += requests(1, DENSE)
    wanted.append(dataclasses.replace(wanted[0], max_new_tokens=1))
    wanted.append(dataclasses.replace(wanted[1], end_tokens=ends))
    cache, settings = None, SchedulerSettings(max_running=5, block_tokens=4)
    if blocks:
        cache = fast.backbone_for(2).new_block_cache(40, block_size=4, max_rows=5)
    engine = fast.engine(max_running=5, cache=cache, scheduler=Scheduler(settings))
    numbers = [engine.add(request) for request in wanted]
    traces = {}
    while engine.unfinished:
        traces |= {one.id: one.trace for one in engine.step() if one.trace is not None}
    expected = dense(fast, wanted)
    assert [traces[number].tokens for number in numbers] == expected
    assert sum(traces[number].drafted for number in numbers[:3]) > 0
    assert sum(traces[number].rejected for number in numbers[:3]) > 0
    if blocks:
        cache.check()
        assert engine.stats().free_blocks == 40


def test_drafts_that_do_not_pay_beside_others_are_looked_up_in_one_pass_of_sixteen(fast):
    step = fast.engine(max_running=2)._decode.proposed
    step._drafted, step._accepted, step._extra = 100.0, 30.0, 1e-3
    assert all(step._lookup_pays(4e-3) for _ in range(32))
    assert sum(step._lookup_pays(3e-3) for _ in range(32)) == 2
    step._accepted = 100.0
    assert step._lookup_pays(3e-3) and not step._lookup_pays(1e-4)  # a pass that takes no time


def test_requests_that_need_the_loop_between_drafts_are_drafted_step_by_step(fast):
    wanted = requests(3) + requests(2, sampling=TokenChooser(sample=True, seed=3))
    wanted += requests(1, DENSE)
    assert served(fast.engine(max_running=6), wanted) == dense(fast, wanted)
