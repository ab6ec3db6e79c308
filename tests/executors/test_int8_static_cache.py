"""Keys and values in 8 bits by the C++ kernels: the same numbers as by transformers' modules."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.cache.int8_cache import packed
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

INT8 = {"kv_storage": "int8", "do_sample": False, "pad_token_id": 0, "max_new_tokens": 16}
# Width of a head: whole vectors, a rest behind them, and none.
SHAPES = [{}, {"head_dim": 40}, {"head_dim": 6}, {"head_dim": 64, "num_key_value_heads": 4}]


def model_of(family: str = "llama", **settings):
    return tiny_model(family, dtype=torch.float32, initializer_range=0.2, **settings)


@torch.inference_mode()
def run(backbone: Backbone, cache, ids: torch.Tensor, *, step: int) -> torch.Tensor:
    """Logits ``[1, T, V]`` of passes of `step` tokens."""
    made = []
    for start in range(0, ids.shape[1], step):
        part = ids[:, start : start + step]
        ctx = backbone.context(start, part.shape[1], device="cpu")
        hidden = backbone.embed(part, ctx)
        states = backbone.run_layers(hidden, 0, backbone.num_layers, ctx, cache)
        made.append(backbone.logits(states))
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_logits_are_those_of_transformers_modules_over_the_same_cache(settings):
    model, ids = model_of(**settings), random_ids(37)
    generic, fused = Backbone(model), FusedBackbone(model)
    wanted = run(generic, generic.new_int8_cache(37), ids, step=5)
    found = run(fused, fused.new_int8_cache(37), ids, step=5)
    plain = run(fused, fused.new_cache(37), ids, step=5)
    # One value that falls to the other side of a half moves the logits a little.
    assert (found - wanted).abs().max() < 0.2 * (plain - wanted).abs().max()
    assert (found - wanted).abs().mean() < 0.02 * (plain - wanted).abs().mean()


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_a_token_does_not_depend_on_the_tokens_of_its_pass(settings):
    fused, ids = FusedBackbone(model_of("mistral", **settings)), random_ids(43)
    whole = run(fused, fused.new_int8_cache(0), ids, step=43)
    for step in (1, 3, 7):
        assert torch.equal(run(fused, fused.new_int8_cache(43), ids, step=step), whole)


def test_entries_are_rounded_as_by_transformers_modules_and_take_a_quarter():
    fused, ids = FusedBackbone(model_of(head_dim=40)), random_ids(29)
    small, plain = fused.new_int8_cache(29), fused.new_cache(29)
    run(fused, small, ids, step=29)
    run(fused, plain, ids, step=29)
    for held, wanted in zip(small.buffers(0, 1)[0], plain.buffers(0, 1)[0], strict=True):
        assert torch.equal(held[:, :, :29], packed(wanted[:, :, :29]))
    assert small.bytes_allocated / plain.bytes_allocated == 44 / 160


def test_exact_is_dense_over_the_same_cache_alone_in_batches_and_in_an_engine():
    model = AdaptiveModel(model_of(), [1, 2], executor="fused")
    ids = random_ids(9, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"attention_mask": mask, **INT8}
    dense = model.generate(ids, fidelity="dense", **given)
    exact = model.generate(
        ids, fidelity="exact", thresholds=0.02, online=False, return_dict_in_generate=True, **given
    )
    assert torch.equal(exact.sequences, dense)
    assert any(one.exit_layer < 4 for trace in exact.traces for one in trace.records)
    alone = model.generate(ids[:1], fidelity="dense", **INT8)
    assert torch.equal(alone, dense[:1])
    backbone = model.backbone_for(2)
    engine = model.engine(max_running=2, cache=backbone.new_int8_cache(0, 2))
    spec = DecodingSpec(fidelity="exact", kv_storage="int8", thresholds=0.02)
    engine.add(Request(ids[0], 16, spec=spec, end_tokens=()))
    made = []
    while engine.unfinished:
        made += [token for output in engine.step() for token in output.tokens]
    assert made == dense[0, 9:].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_blocks_give_what_rows_give(family):
    fused, ids = FusedBackbone(model_of(family, head_dim=40)), random_ids(43)
    rows = fused.new_int8_cache(43)
    wanted = run(fused, rows, ids, step=43)
    for step in (5, 1, 43):
        cache = fused.new_block_cache(12, block_size=4, storage="int8")
        cache.open_row(43)
        assert torch.equal(run(fused, cache, ids, step=step), wanted)
        for mine, other in zip(cache.states(0, 0), rows.states(0, 0), strict=True):
            assert mine.dtype is torch.float32
            assert torch.equal(mine[:, :, -8:], other[:, :, -8:])


@torch.inference_mode()
def test_a_row_takes_up_the_blocks_in_8_bits_of_another():
    fused, ids = FusedBackbone(model_of(head_dim=40)), random_ids(43)
    wanted = run(fused, fused.new_int8_cache(43), ids, step=43)
    cache = fused.new_block_cache(12, block_size=4, storage="int8")
    cache.open_row(43, ids[0].tolist())
    run(fused, cache, ids, step=43)
    cache.close_row(0)
    row = cache.open_row(43, ids[0].tolist())
    held = cache.length(0, row)
    assert held >= 36
    ctx = fused.context(held, 43 - held, device="cpu")
    states = fused.run_layers(fused.embed(ids[:, held:], ctx), 0, fused.num_layers, ctx, cache)
    assert torch.equal(fused.logits(states), wanted[:, held:])


def test_an_engine_with_blocks_in_8_bits_gives_the_tokens_of_rows():
    model = AdaptiveModel(model_of(), [1, 2], executor="fused")
    ids = random_ids(21)
    dense = model.generate(ids, fidelity="dense", **INT8)[0, 21:].tolist()
    cache = model.backbone_for(2).new_block_cache(40, block_size=4, max_rows=3, storage="int8")
    engine = model.engine(max_running=2, cache=cache)
    spec = DecodingSpec(fidelity="exact", kv_storage="int8", thresholds=0.02)
    made: dict[int, list[int]] = {}
    for _ in range(2):  # the second begins with blocks of the first
        engine.add(Request(ids[0], 16, spec=spec, end_tokens=()))
        while engine.unfinished:
            for output in engine.step():
                made.setdefault(output.id, []).extend(output.tokens)
    assert list(made.values()) == [dense, dense]
    with pytest.raises(DeliberateError, match="kv_storage='native' in an engine whose cache is 'i"):
        engine.add(Request(ids[0], 4))
    with pytest.raises(DeliberateError, match="storage='int8' of a cache in blocks: the C"):
        Backbone(model.base).new_block_cache(8, storage="int8")


def test_other_engines_of_the_fused_executor_refuse():
    fused = FusedBackbone(model_of(), engine="eager")
    with pytest.raises(DeliberateError, match="kv_storage='int8' with a fused executor that reads"):
        fused.new_int8_cache(8)
