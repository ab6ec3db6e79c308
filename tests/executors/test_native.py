"""The C++ kernels: right at odd shapes, the same whoever rides along, and never in the way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fused_cases import FAMILIES, close, stepwise
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.backbone import FusedBackbone, FusedReader
from deliberate.executors.quantization import widened
from deliberate.kernels import native_build
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitReader

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
ODD = {"hidden_size": 36, "intermediate_size": 51, "head_dim": 10}


def native(model, **settings) -> FusedBackbone:
    return FusedBackbone(model, engine="native", **settings)


def single(name: str, **overrides):
    architecture, settings = FAMILIES[name]
    return tiny_model(architecture, dtype=torch.float32, **(settings | overrides))


def double(model):
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_keys_equal_a_reference_in_double_precision(name, shape):
    model, ids = single(name, **shape), random_ids(20)
    theirs, their_cache = stepwise(Backbone(double(model)), ids)
    ours, our_cache = stepwise(native(model), ids)
    assert close(ours.double(), theirs)
    for layer in range(4):
        for mine, other in zip(our_cache.states(layer), their_cache.states(layer), strict=True):
            assert close(mine.double(), other)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
def test_smaller_weights_stand_for_what_they_are_widened_to(storage, shape):
    model, ids = single("qwen2", **shape), random_ids(20)
    backbone = native(model, weights=storage)
    reference = double(model)
    for mine, layer in zip(backbone._weights, reference.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for matrix, parts in (
            (mine.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (mine.out, (attention.o_proj,)),
            (mine.gate_up, (mlp.gate_proj, mlp.up_proj)),
            (mine.down, (mlp.down_proj,)),
        ):
            wide = widened(matrix, torch.float64).split([p.out_features for p in parts])
            for part, weight in zip(parts, wide, strict=True):
                part.weight.data = weight.clone()
    reference.lm_head.weight.data = widened(backbone.head, torch.float64)
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear):  # activations are rounded to bfloat16
            module.register_forward_pre_hook(lambda _, given: (given[0].bfloat16().double(),))
    ours, theirs = stepwise(backbone, ids)[0].double(), stepwise(Backbone(reference), ids)[0]
    # An activation near the middle of two bfloat16 may be rounded to the other one.
    assert close(ours, theirs, 1e-2)
    assert (ours - theirs).abs().median() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2, windows", "qwen3"])
@torch.inference_mode()
def test_a_token_is_the_same_to_the_bit_whoever_rides_along(name):
    model, ids = single(name, **ODD), random_ids(40)
    backbone = native(model)
    made = []
    for sizes in ((1,) * 13, (2, 3, 5, 3), (13,)):
        cache = backbone.new_cache()
        ctx = backbone.context(0, 9, device="cpu")
        backbone.run_layers(backbone.embed(ids[:, :9], ctx), 0, 4, ctx, cache)
        at, parts = 9, []
        for q in sizes:
            ctx = backbone.context(at, q, device="cpu")
            hidden = backbone.embed(ids[:, at : at + q], ctx)
            parts.append(backbone.run_layers(hidden, 0, 4, ctx, cache))
            at += q
        made.append(backbone.logits(torch.cat(parts, dim=1)))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@torch.inference_mode()
def test_ragged_rows_are_the_same_to_the_bit_as_alone():
    model, ids = single("mistral"), random_ids(24, batch=3)
    backbone, held = native(model), (14, 9, 4)
    cache = backbone.new_cache(8, 3)
    ctx = backbone.context(0, 14, device="cpu")
    backbone.run_layers(backbone.embed(ids[:, :14], ctx), 0, 4, ctx, cache)
    for row, length in enumerate(held):
        cache.crop(length, row)
    rows, counts = (0, 2), (2, 5)
    starts = tuple(held[row] for row in rows)
    ctx = backbone.pass_context(rows, starts, counts, batch=3)
    together = backbone.run_layers(backbone.embed(ids[[0, 2], 14:19], ctx), 0, 4, ctx, cache)
    for place, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        alone = backbone.new_cache()
        ctx = backbone.context(0, 14, device="cpu")
        backbone.run_layers(backbone.embed(ids[row : row + 1, :14], ctx), 0, 4, ctx, alone)
        alone.crop(start)
        ctx = backbone.context(start, count, device="cpu")
        states = backbone.embed(ids[row : row + 1, 14 : 14 + count], ctx)
        expected = backbone.run_layers(states, 0, 4, ctx, alone)
        assert torch.equal(together[place, :count], expected[0])
        assert cache.row_lengths(row) == [start + count] * 4
    assert cache.row_lengths(1) == [9] * 4


@torch.inference_mode()
def test_padding_of_a_ragged_pass_goes_through_no_layer(monkeypatch):
    backbone, ids = native(single("llama")), random_ids(6, batch=3)
    cache = backbone.new_cache(8, 3)
    run, tokens = type(backbone._layers.layers).run, []

    def counted(self, first, last, kv, hidden, *rest, **more):
        tokens.append(hidden.numel() // hidden.shape[-1])
        return run(self, first, last, kv, hidden, *rest, **more)

    monkeypatch.setattr(type(backbone._layers.layers), "run", counted)
    ctx = backbone.pass_context((0, 1, 2), (0, 0, 0), (6, 1, 2), batch=3)
    backbone.run_layers(backbone.embed(ids, ctx), 0, 4, ctx, cache)
    assert tokens == [9]


@torch.inference_mode()
def test_what_stands_behind_the_end_of_a_row_does_not_matter():
    model, ids = single("llama"), random_ids(20)
    clean, _ = stepwise(native(model), ids)
    backbone = native(model)
    make = backbone.new_cache

    def poisoned(capacity: int = 0, batch: int = 1):
        cache = make(capacity, batch)
        for pair in cache.buffers(0, 4):
            for buffer in pair:
                buffer.fill_(math.nan)
        return cache

    backbone.new_cache = poisoned
    assert torch.equal(stepwise(backbone, ids)[0], clean)


LONGEST = 300


def long_model(storage: str | None, name: str = "llama", **shape) -> FusedBackbone:
    base = single(name, layers=3, max_position_embeddings=512, **shape)
    return native(base, weights=storage)


@torch.inference_mode()
def alone(backbone: FusedBackbone, ids: torch.Tensor):
    """States after each layer run of a text, token by token, and the cache."""
    cache, states = backbone.new_cache(ids.shape[1]), []
    for at in range(ids.shape[1]):
        ctx = backbone.context(at, 1, device="cpu")
        states.append(
            backbone.run_layers(backbone.embed(ids[:, at : at + 1], ctx), 0, 3, ctx, cache)
        )
    return torch.cat(states, dim=1), cache


@pytest.mark.parametrize("storage", [None, "bf16", "int8", "int4"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "in blocks"])
@torch.inference_mode()
def test_passes_of_1_to_300_tokens_give_what_single_tokens_give(storage, wide):
    # Products so wide that a long pass is cut into blocks.
    backbone = long_model(storage, **({"intermediate_size": 4096} if wide else ODD))
    ids = random_ids(LONGEST)
    expected, held = alone(backbone, ids)
    for q in range(1, LONGEST + 1, 23 if wide else 1):
        cache = backbone.new_cache(q)
        ctx = backbone.context(0, q, device="cpu")
        made = backbone.run_layers(backbone.embed(ids[:, :q], ctx), 0, 3, ctx, cache)
        assert torch.equal(made, expected[:, :q]), q
    for layer in range(3):
        for mine, other in zip(cache.states(layer), held.states(layer), strict=True):
            assert torch.equal(mine, other[:, :, : mine.shape[2]])


@pytest.mark.parametrize("storage", [None, "bf16", "int8", "int4", "q8_0"])
@torch.inference_mode()
def test_a_text_cut_anywhere_gives_what_single_tokens_give(storage):
    backbone = long_model(storage, "qwen2, windows", **ODD)
    ids = random_ids(LONGEST)
    expected, _ = alone(backbone, ids)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        cache, at = backbone.new_cache(LONGEST), 0
        while at < LONGEST:
            q = min(int(torch.randint(1, 120, (), generator=generator)), LONGEST - at)
            ctx = backbone.context(at, q, device="cpu")
            hidden = backbone.embed(ids[:, at : at + q], ctx)
            made = backbone.run_layers(hidden, 0, 3, ctx, cache)
            assert torch.equal(made, expected[:, at : at + q])
            at += q


@pytest.mark.parametrize("storage", [None, "bf16", "int8", "int4"])
@pytest.mark.parametrize("measure", ["max_prob", "gate"])
@torch.inference_mode()
def test_heads_read_1_to_300_states_as_they_read_one(storage, measure):
    exits = ExitConfig.build(3, [1], measure=measure, translator="low_rank", rank=3)
    base = single("llama", layers=3, **ODD)
    adaptive = AdaptiveModel(base, exits, executor="fused", engine="native", weights=storage)
    for parameter in adaptive.exits.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    backbone, reader = adaptive.backbone, adaptive.reader()
    states = torch.randn(LONGEST, 36)
    tops = torch.cat([backbone.logits(one[None]) for one in states])
    bare = torch.cat([backbone.head_logits(one[None]) for one in states])
    exit_logits = torch.cat([reader.logits(0, one[None]) for one in states])
    looks = [reader.evaluate(0, one[None], 0.5) for one in states]
    for rows in range(1, LONGEST + 1):
        assert torch.equal(backbone.logits(states[:rows]), tops[:rows])
        assert torch.equal(backbone.head_logits(states[:rows]), bare[:rows])
        assert torch.equal(reader.logits(0, states[:rows]), exit_logits[:rows])
        compare = reader.evaluate(0, states[:rows], 0.5)
        assert compare.confidences == [one.confidences[0] for one in looks[:rows]]
        top = backbone.read_full_depth(states[:rows])
        assert top.tokens == tops[:rows].argmax(-1).tolist()
    assert [compare.token(row) for row in range(rows)] == [one.token(0) for one in looks]


@pytest.mark.parametrize("storage", [None, "int8", "int4"])
@torch.inference_mode()
def test_batches_of_many_rows_give_what_each_row_gives_alone(storage):
    backbone = long_model(storage, "mistral", **ODD)
    ids = random_ids(6, batch=130)
    expected = torch.cat([alone(backbone, row[None])[0] for row in ids])
    for rows in (2, 9, 64, 65, 130):
        cache, ctx = backbone.new_cache(6, rows), backbone.context(0, 6, device="cpu")
        made = backbone.run_layers(backbone.embed(ids[:rows], ctx), 0, 3, ctx, cache)
        assert torch.equal(made, expected[:rows])


@pytest.mark.parametrize("kv_mode", ["propagate", "skip"])
def test_rows_of_a_batch_decode_as_alone_where_layers_are_skipped(kv_mode):
    base = single("llama", layers=5)
    adaptive = AdaptiveModel(base, [1, 2], executor="fused", engine="native")
    ids = random_ids(7, batch=12)
    how = {"fidelity": "threshold", "thresholds": 0.06, "kv_mode": kv_mode, "max_new_tokens": 20}
    together = adaptive.generate(ids, **how)
    for row in range(12):
        assert torch.equal(adaptive.generate(ids[row : row + 1], **how)[0], together[row])


@pytest.mark.parametrize("storage", ["native", "bf16", "int8", "int4", "q8_0"])
def test_exact_is_dense_in_batches_whatever_the_weights_are_stored_as(storage):
    exits = [1, 2, 3]
    adaptive = AdaptiveModel(
        single("llama", layers=5, hidden_size=64), exits, executor="fused", weights=storage
    )
    ids = random_ids(7, batch=90)
    how = {"max_new_tokens": 12, "online": False, "thresholds": 0.04}
    exact = adaptive.generate(ids, fidelity="exact", **how)
    assert torch.equal(exact, adaptive.generate(ids, fidelity="dense", **how))


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("translator", ["low_rank", "full", "none"])
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_exits_say_what_the_generic_reader_says(measure, translator, folded):
    exits = ExitConfig.build(4, [1, 2], measure=measure, translator=translator, rank=3)
    adaptive = AdaptiveModel(single("llama"), exits)
    with torch.no_grad():
        for parameter in adaptive.exits.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model_bytes = 10**9 if folded else 0
    plain = Backbone(adaptive.base)
    theirs = ExitReader(
        adaptive.exits,
        plain.norm,
        plain.lm_head,
        plain.head_logits,
        plain.softcap,
        model_bytes=model_bytes,
    )
    ours = FusedReader(adaptive.exits, native(adaptive.base), model_bytes=model_bytes)
    assert set(ours.heads) == {0, 1}
    states = torch.randn(3, 32)
    for index in range(2):
        wanted, made = (reader.evaluate(index, states, 0.3) for reader in (theirs, ours))
        assert made.confidences == pytest.approx(wanted.confidences, rel=1e-4, abs=1e-6)
        for row in range(3):
            assert made.token(row) == wanted.token(row)
            assert made.logits(row).shape == (VOCAB,)
            assert close(made.logits(row), wanted.logits(row))


def test_a_state_that_is_not_a_number_never_leaves():
    adaptive = AdaptiveModel(single("llama"), [1, 2])
    reader = FusedReader(adaptive.exits, native(adaptive.base), model_bytes=0)
    for bad in (math.nan, math.inf):
        states = torch.randn(2, 32)
        states[0, 5] = bad
        confidences = reader.evaluate(0, states, 0.0).confidences
        assert math.isnan(confidences[0]) and 0.0 < confidences[1] <= 1.0
