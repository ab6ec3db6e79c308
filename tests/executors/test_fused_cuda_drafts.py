"""A draft layer by the ops of the CUDA executor: one graph a call, the same entries and drafts."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import Recorder, adaptive, cpu_only
from fused_cases import family
from tiny_models import VOCAB, random_ids

from deliberate.engine.draft_lengths import DraftLengths
from deliberate.engine.draft_switch import DraftSwitch
from deliberate.executors.draft_executor import DraftExecutor
from deliberate.executors.fused.cuda.draft_passes import MOST_ENTRIES
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig

# The ops compute in float32 in part.
NEAR = {"atol": 1e-4, "rtol": 1e-4}


def draft_layer(width: int, vocabulary: int = VOCAB) -> DraftLayer:
    torch.manual_seed(0)
    layer = DraftLayer(DraftLayerConfig(width, 4, 2, 8, 48, vocabulary, rope_theta=1000.0))
    layer.vocabulary.copy_(torch.randperm(VOCAB)[:vocabulary].sort().values)
    return layer


@pytest.fixture
def pair():
    """Executors of one layer: by torch, and by graphs of the recorded device."""
    base, device = family("llama"), Recorder()
    model = adaptive(base, [2], device=device)
    layer = draft_layer(model.backbone.hidden_size, 60)
    by_graphs = DraftExecutor(layer, model.backbone)
    assert not by_graphs.native
    return DraftExecutor(layer, Backbone(base)), by_graphs, device


@cpu_only
def test_entries_and_drafts_of_several_sequences_are_those_by_torch(pair):
    plain, by_graphs, _ = pair
    rows = [[one.open() for _ in range(3)] for one in (plain.new_rows(), by_graphs.new_rows())]
    torch.manual_seed(1)
    width = plain._config.hidden_size
    for counts in ([1, 5, 2], [3, 1, 1], [1, 1, 1], [2, MOST_ENTRIES + 3, 1], [1, 2, 7]):
        states = torch.randn(sum(counts), width, dtype=plain.dtype)
        tokens = [random_ids(count)[0].tolist() for count in counts]
        wanted = plain.extend_rows(rows[0], states, tokens)
        made = by_graphs.extend_rows(rows[1], states, tokens)
        assert torch.allclose(made, wanted, **NEAR)
        for theirs, ours in zip(*rows, strict=True):
            assert theirs.length == ours.length
            for name in ("keys", "values"):
                held = [getattr(one, name)[:, :, : one.length] for one in (theirs, ours)]
                assert torch.allclose(*held, **NEAR)
        last = wanted[:3]
        for (token, score), (ours, own) in zip(
            plain.read_rows(last), by_graphs.read_rows(made[:3]), strict=True
        ):
            assert token == ours and score == pytest.approx(own, abs=1e-4)
        for one in (*rows[0][1:], *rows[1][1:]):
            one.crop(one.length - 1)  # a rejected draft


@cpu_only
def test_a_draft_is_one_replay_of_the_layer_and_one_of_the_head(pair):
    _, by_graphs, device = pair
    cache, width = by_graphs.new_cache(), by_graphs._config.hidden_size
    output = torch.randn(1, width, dtype=by_graphs.dtype)
    for step in range(4):
        begun = len(device.log)
        output = by_graphs.extend(cache, output, [step])
        by_graphs.read(output)
        assert len(device.log) - begun == 2
    assert len(device.captured) == 2  # and both were captured at the first


@cpu_only
def test_rows_that_grow_are_read_where_they_lie(pair):
    plain, by_graphs, _ = pair
    shared = by_graphs.new_rows()
    first, state = shared.open(), torch.randn(1, plain._config.hidden_size, dtype=plain.dtype)
    by_graphs.extend(first, state, [3])
    second = shared.open()  # the rows have moved
    ours = by_graphs.extend_rows([first, second], state.repeat(2, 1), [[4], [3]])
    alone = plain.new_cache()
    plain.extend(alone, state, [3])
    wanted = plain.extend(alone, state, [4])
    assert torch.allclose(ours[:1], wanted, **NEAR)
    assert torch.allclose(ours[1:], plain.extend(plain.new_cache(), state, [3]), **NEAR)


@cpu_only
def test_exact_mode_drafts_by_graphs_and_gives_denses_tokens(monkeypatch):
    monkeypatch.setattr(DraftLengths, "begin", lambda self: True)
    monkeypatch.setattr(DraftSwitch, "on", lambda self: True)
    model = adaptive(family("llama"), [2], device=Recorder())
    model.attach_draft(draft_layer(model.backbone.hidden_size))
    for seed in range(2):
        prompt = random_ids(7, seed=seed)
        dense = model.generate(prompt, max_new_tokens=24, fidelity="dense")
        out = model.generate(prompt, max_new_tokens=24, return_dict_in_generate=True)
        assert out.sequences.tolist() == dense.tolist() and out.trace.drafted > 0
