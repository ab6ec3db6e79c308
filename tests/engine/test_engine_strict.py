"""Strict exact mode beside other requests of an engine; one request at a time, with a queue."""

from __future__ import annotations

import functools

import pytest
import torch
from mixed_requests import Unsteady
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

NEW = 24
EXACT = {"fidelity": "exact", "thresholds": 0.02, "online": False, "gate": False}
DENSE = DecodingSpec(fidelity="dense", gate=False)


@functools.cache
def half(arch: str) -> AdaptiveModel:
    base = tiny_model(arch, layers=6, dtype=torch.bfloat16)
    return AdaptiveModel(base, [1, 2, 4], executor="generic")


def prompt(seed: int) -> list[int]:
    return random_ids(5 + seed, seed=seed)[0].tolist()


def alone(model: AdaptiveModel, seed: int) -> list[int]:
    ids = torch.tensor([prompt(seed)])
    out = model.generate(ids, fidelity="dense", max_new_tokens=NEW)
    return out[0, ids.shape[1] :].tolist()


def served(engine, requests) -> tuple[list[list[int]], list]:
    numbers = [engine.add(request) for request in requests]
    tokens, traces = {number: [] for number in numbers}, {}
    while engine.unfinished:
        for output in engine.step():
            tokens[output.id] += output.tokens
            traces[output.id] = output.trace
    return [tokens[number] for number in numbers], [traces[number] for number in numbers]


@pytest.mark.parametrize(("arch", "blocks"), [("mistral", False), ("llama", True)])
def test_strict_requests_have_the_tokens_of_dense_alone_whoever_shares_their_passes(arch, blocks):
    own = half(arch)
    cache = own.backbone.new_block_cache(40, max_rows=4, block_size=4) if blocks else None
    limits = {"max_running": 4, "prefill_tokens": 9, "idle_prefill_tokens": 9}
    scheduler = Unsteady(0, 0.1, **limits | ({"block_tokens": 4} if blocks else {}))
    engine = own.engine(max_running=4, cache=cache, scheduler=scheduler)
    strict = DecodingSpec(strict=True, **EXACT)
    wanted = [Request(prompt(seed), NEW, strict, end_tokens=()) for seed in range(5)]
    others = [Request(prompt(seed), NEW, DENSE, end_tokens=()) for seed in range(2)]
    tokens, traces = served(engine, wanted + others)
    assert tokens[:5] == [alone(own, seed) for seed in range(5)]
    assert sum(trace.near_ties for trace in traces[:5]) > 0 and engine.stats().preempted > 0
    assert not engine._near_ties, "what is kept of a strict request ends with it"


def test_strict_is_refused_where_blocks_behind_a_window_are_freed():
    own = half("mistral")
    engine = own.engine(max_running=2, cache=own.backbone.new_block_cache(40, max_rows=2))
    with pytest.raises(DeliberateError, match="strict with a cache in blocks and a sliding window"):
        engine.add(Request(prompt(0), NEW, DecodingSpec(strict=True, **EXACT)))


def test_without_strict_a_request_beside_others_may_have_other_tokens_than_dense():
    own = half("mistral")
    wanted = [Request(prompt(seed), NEW, DecodingSpec(**EXACT), end_tokens=()) for seed in range(8)]
    tokens, _ = served(own.engine(max_running=4), wanted)
    if tokens == [alone(own, seed) for seed in range(8)]:
        pytest.skip("this processor's products in bfloat16 do not depend on what shares a pass")


def test_one_request_at_a_time_takes_several_steps_in_a_call_with_others_waiting():
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2], executor="fused")
    engine = model.engine(max_running=1)
    wanted = [Request(prompt(seed), 40, DENSE, end_tokens=()) for seed in range(3)]
    tokens, traces = served(engine, wanted)
    assert [len(one) for one in tokens] == [40] * 3
    assert sum(trace.layer_calls[0] for trace in traces) == 3 * 39
    assert engine.stats().steps < 40
