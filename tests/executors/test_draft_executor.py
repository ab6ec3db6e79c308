"""A draft layer while decoding: it computes what training did, and its keys follow rollbacks."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from deliberate.executors.draft_executor import DraftExecutor
from deliberate.executors.quantization import Storage
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.train.draft.unrolled import unrolled
from deliberate.utils.errors import DeliberateError

DEPTH = 4


def draft_layer(backbone, vocabulary=VOCAB, seed=0):
    torch.manual_seed(seed)
    config = DraftLayerConfig(backbone.hidden_size, 4, 2, 16, 48, vocabulary, rope_theta=1000.0)
    layer = DraftLayer(config)
    layer.vocabulary.copy_(torch.randperm(VOCAB)[:vocabulary].sort().values)
    return layer


def case(dtype, tokens=11, architecture="llama"):
    backbone = Backbone(tiny_model(architecture, dtype=dtype))
    torch.manual_seed(1)
    states = 3.0 * torch.randn(tokens, backbone.hidden_size, dtype=dtype)
    ids = torch.randint(0, VOCAB, (tokens,))
    return backbone, draft_layer(backbone), states, ids


@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [(torch.float64, "llama"), (torch.float64, "gpt2"), (torch.float32, "llama")],
)
def test_drafts_of_every_starting_point_equal_the_unrolled_layer_of_training(dtype, architecture):
    backbone, layer, states, ids = case(dtype, architecture=architecture)
    layer = layer.to(dtype)
    executor = DraftExecutor(layer, backbone, Storage.NATIVE)
    assert executor.native == (dtype == torch.float32)
    with torch.no_grad():
        embedded, normed = backbone.embed_tokens(ids[1:]), backbone.norm(states[:-1])
        outputs = unrolled(layer, embedded, normed, backbone.norm, depth=DEPTH, first=2)
    cache, tolerance = executor.new_cache(), 1e-9 if dtype == torch.float64 else 2e-4
    entries = len(ids) - 1
    for start in range(entries):
        output = executor.extend(cache, states[start : start + 1], [int(ids[start + 1])])
        for step in range(DEPTH):
            if step:  # the layer's own output in the place of a state
                output = executor.extend(cache, output, [int(ids[start + step + 1])])
            if start >= 2:
                wanted = outputs[step][start - 2]
                assert torch.allclose(output[0], wanted, rtol=tolerance, atol=tolerance)
            if start + step + 2 > entries:
                break
        cache.crop(start + 1)


@pytest.mark.parametrize("storage", [Storage.NATIVE, Storage.INT8])
def test_entries_written_together_equal_entries_written_one_by_one(storage):
    backbone, layer, states, ids = case(torch.float32)
    executor = DraftExecutor(layer, backbone, storage)
    together, single = executor.new_cache(), executor.new_cache()
    whole = executor.extend(together, states[:-1], ids[1:].tolist())
    for index in range(len(ids) - 1):
        part = executor.extend(single, states[index : index + 1], [int(ids[index + 1])])
        assert torch.allclose(part[0], whole[index], atol=1e-5)
    assert together.length == single.length == len(ids) - 1
    end = together.length
    assert torch.allclose(together.keys[:, :, :end], single.keys[:, :, :end], atol=1e-5)
    assert torch.allclose(together.values[:, :, :end], single.values[:, :, :end], atol=1e-5)


def test_dropped_entries_leave_no_trace_and_room_grows():
    backbone, layer, states, ids = case(torch.float32)
    executor = DraftExecutor(layer, backbone)
    clean, used = executor.new_cache(), executor.new_cache()
    used_states = states.repeat(100, 1)
    executor.extend(used, used_states[:600], [3] * 600)
    assert used.capacity >= 600
    used.crop(0)
    first = executor.extend(clean, states[:-1], ids[1:].tolist())
    assert executor.extend(used, states[:-1], ids[1:].tolist()).equal(first)


def test_a_drafted_token_is_the_best_of_the_draft_vocabulary():
    backbone = Backbone(tiny_model("llama", dtype=torch.float32))
    layer = draft_layer(backbone, vocabulary=9)
    allowed = layer.vocabulary.tolist()
    for storage in (Storage.NATIVE, Storage.BF16):
        executor = DraftExecutor(layer, backbone, storage)
        state = torch.randn(1, backbone.hidden_size).requires_grad_(False)
        token, confidence = executor.read(state)
        logits = backbone.logits(state)[0].detach()
        assert token == max(allowed, key=lambda one: float(logits[one]))
        wanted = logits[allowed].softmax(dim=-1).max()
        assert confidence == pytest.approx(float(wanted), abs=5e-3)


def test_a_layer_of_another_model_is_refused_by_name():
    backbone = Backbone(tiny_model("llama", dtype=torch.float32))
    layer = draft_layer(backbone)
    layer.vocabulary[-1] = VOCAB + 5
    with pytest.raises(DeliberateError, match=f"tokens up to {VOCAB + 5}.*{VOCAB} tokens"):
        DraftExecutor(layer, backbone)
    config = DraftLayerConfig(backbone.hidden_size + 2, 2, 2, 8, 16, 5)
    with pytest.raises(DeliberateError, match="states of width"):
        DraftExecutor(DraftLayer(config), backbone)


def test_sizes_that_cannot_be_are_one_line():
    with pytest.raises(DeliberateError, match="kv_heads must divide heads"):
        DraftLayerConfig(32, 3, 2, 8, 16, 5)
    with pytest.raises(DeliberateError, match="vocabulary 0 must be at least 1"):
        DraftLayerConfig(32, 2, 2, 8, 16, 0)
