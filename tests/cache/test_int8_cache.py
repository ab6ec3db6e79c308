"""Keys and values in 8 bits: exact is dense over the same cache, and the bytes are a quarter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache

from deliberate.api.model import AdaptiveModel
from deliberate.cache.int8_cache import Int8Cache, packed, unpacked
from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.policies.guarantee_settings import decoding_conditions
from deliberate.utils.errors import DeliberateError

INT8 = {"kv_storage": "int8", "do_sample": False, "pad_token_id": 0, "max_new_tokens": 16}


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=12),
    st.integers(-60, 60),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_rounded_vector_is_within_half_a_step_and_stays_what_it_is(numbers, power, dtype):
    vector = torch.tensor([numbers], dtype=dtype) * 2.0**power
    found = unpacked(packed(vector), torch.float64)
    step = float(vector.abs().max()) / 127
    assert float((found - vector.double()).abs().max()) <= 0.501 * step
    again = unpacked(packed(found), torch.float64)
    assert float((again - found).abs().max()) <= 1e-5 * step
    assert bool((unpacked(packed(0 * vector), dtype) == 0).all())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_exact_is_dense_over_the_same_cache(name):
    model = AdaptiveModel(tiny_model(name), [1, 2], executor="generic")
    ids = random_ids(9, batch=2)
    dense = model.generate(ids, fidelity="dense", **INT8)
    exact = model.generate(
        ids, fidelity="exact", thresholds=0.02, online=False, return_dict_in_generate=True, **INT8
    )
    assert torch.equal(exact.sequences, dense)
    assert any(one.exit_layer < 4 for trace in exact.traces for one in trace.records)
    alone = model.generate(ids[:1], fidelity="dense", **INT8)
    assert torch.equal(alone, dense[:1])


def test_it_keeps_fewer_bytes_and_logits_that_are_near():
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2], executor="generic")
    backbone, ids = model.backbone, random_ids(40)
    logits, held = [], []
    for make in (backbone.new_cache, backbone.new_int8_cache):
        cache = make(40)
        ctx = backbone.context(0, 40, device="cpu")
        with torch.inference_mode():
            states = backbone.run_layers(backbone.embed(ids, ctx), 0, 4, ctx, cache)
            logits.append(backbone.logits(states))
        held.append(cache.bytes_allocated)
    head_dim = 8
    assert held[1] / held[0] == (head_dim + 4) / (4 * head_dim)
    difference = (logits[0] - logits[1]).abs().max() / logits[0].std()
    assert 0 < float(difference) < 0.3


@pytest.mark.parametrize("executor", ["generic", "fused"])
def test_a_callers_cache_is_continued_and_filled(executor):
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2], executor=executor)
    ids = random_ids(9)
    cache = DynamicCache()

    def longer(ids: torch.Tensor, count: int, **settings) -> torch.Tensor:
        settings = {**INT8, "max_new_tokens": count, "fidelity": "exact", **settings}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    whole = longer(ids, 12)
    first = longer(ids, 6, past_key_values=cache)
    assert cache.get_seq_length() == 14
    assert torch.equal(longer(first, 6, past_key_values=cache), whole)


def test_requests_of_an_engine_share_one_storage():
    model = AdaptiveModel(tiny_model("llama"), [1, 2], executor="generic")
    backbone = model.backbone_for(2)
    engine = model.engine(max_running=2, cache=backbone.new_int8_cache(0, 2))
    spec = DecodingSpec(fidelity="exact", kv_storage="int8", thresholds=0.02)
    ids = random_ids(9)
    for _ in range(2):
        engine.add(Request(ids[0], 16, spec=spec, end_tokens=()))
    made: dict[int, list[int]] = {}
    while engine.unfinished:
        for output in engine.step():
            made.setdefault(output.id, []).extend(output.tokens)
    dense = model.generate(ids, fidelity="dense", **INT8)[0, 9:].tolist()
    assert list(made.values()) == [dense, dense]
    with pytest.raises(DeliberateError, match="kv_storage='native' in an engine whose cache is 'i"):
        engine.add(Request(ids[0], 4))
    with pytest.raises(DeliberateError, match="kv_storage='int8' in an engine whose cache is 'nat"):
        model.engine().add(Request(ids[0], 4, spec=spec))


def test_an_executor_that_cannot_and_a_guarantee_that_was_not_made_for_it_refuse():
    fused = AdaptiveModel(tiny_model("llama"), [1, 2], executor="fused")  # float64: no C++ kernels
    with pytest.raises(DeliberateError, match="kv_storage='int8' with a fused executor that reads"):
        fused.generate(random_ids(5), fidelity="exact", **INT8)
    with pytest.raises(DeliberateError, match="kv_storage 'int4' is unknown; it is one of native"):
        DecodingSpec(kv_storage="int4")
    with pytest.raises(DeliberateError, match="kv_storage='int8' with fidelity 'budget'"):
        DecodingSpec(kv_storage="int8", fidelity="budget")
    found = decoding_conditions(fused, DecodingSpec(kv_storage="int8"), max_new_tokens=4)
    assert found["kv_storage"] == "int8"
    plain = DecodingSpec(fidelity="exact")
    assert "kv_storage" not in plain.given()  # hashes of earlier specs stay
    assert issubclass(Int8Cache, SegmentCache)
