"""Requests share a beginning only where its keys and values were made by the same weights."""

from __future__ import annotations

import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.api.model_engine import kv_key
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec

PROMPT = random_ids(21)[0].tolist()
DENSE = DecodingSpec(fidelity="dense")


def answer(engine) -> tuple[list[int], int]:
    """Tokens of a request, and how many tokens of its prompt were run for it."""
    before = engine.stats().prefilled
    engine.add(Request(PROMPT, 5, spec=DENSE, end_tokens=()))
    tokens: list[int] = []
    while engine.unfinished:
        for output in engine.step():
            tokens += output.tokens
    return tokens, engine.stats().prefilled - before


def alone(model: AdaptiveModel) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=5, fidelity="dense")
    return out[0, len(PROMPT) :].tolist()


def wrapped(seed: int) -> AdaptiveModel:
    """Two of these are one base with two adapters merged into it: other weights of one layer."""
    base = tiny_model("llama", dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.weight += (
            0.5 * torch.randn(16, 2) @ torch.randn(2, 32)
        )
    return AdaptiveModel(base, [1, 2])


def test_two_adapters_never_share_a_beginning_in_one_cache():
    first, second = wrapped(1), wrapped(2)
    cache = first.backbone_for(2).new_block_cache(60, block_size=4, max_rows=2)
    engines = [model.engine(max_running=2, cache=cache) for model in (first, second)]
    prefilled = []
    for _ in range(2):
        for model, engine in zip((first, second), engines, strict=True):
            tokens, count = answer(engine)
            assert tokens == alone(model)
            prefilled.append(count)
    # 20 tokens are in full blocks: each model runs them once, and the other's are not taken up.
    assert prefilled == [21, 21, 1, 1]


def test_weights_written_in_place_end_the_sharing_of_what_they_made():
    model = wrapped(1)
    cache = model.backbone_for(2).new_block_cache(60, block_size=4, max_rows=2)
    engine = model.engine(max_running=2, cache=cache)
    assert [answer(engine)[1] for _ in range(2)] == [21, 1]
    with torch.no_grad():
        model.base.model.layers[1].self_attn.k_proj.weight.data.mul_(1.5)
    tokens, count = answer(engine)
    assert count == 21 and tokens == alone(model)


def test_an_adapter_that_is_turned_off_makes_other_keys():
    model = wrapped(1)
    backbone = model.backbone_for(2)
    plain = kv_key(model, backbone)
    layer = model.base.model.layers[0].self_attn.k_proj
    layer.lora_A, layer.active_adapters, layer.disable_adapters = {}, ["default"], False
    on = kv_key(model, backbone)
    layer.disable_adapters = True
    assert len({plain, on, kv_key(model, backbone)}) == 3
