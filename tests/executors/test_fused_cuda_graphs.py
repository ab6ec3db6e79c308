"""Graphs of the CUDA executor replayed as functions, and the memory that they are lent."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import Recorder, adaptive, by_ops, cpu_only
from fused_cases import close, family, stepwise
from tiny_models import random_ids

from deliberate.api.model import AdaptiveModel
from deliberate.executors.fused.cuda.graphs import Captures, HostDevice, SegmentGraphs
from deliberate.executors.fused.cuda.workspaces import bucket
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError


@cpu_only
def test_one_graph_serves_every_position_row_list_and_generation():
    base, device = family("qwen2"), Recorder()
    model = adaptive(base, [1, 2], device=device)
    ids = random_ids(5, batch=3)
    settings = {"max_new_tokens": 8, "fidelity": "threshold", "thresholds": 0.1}
    expected = AdaptiveModel(base, [1, 2]).generate(ids, **settings)
    for _ in range(2):  # two sets of memory, while the last generation is not collected yet
        assert torch.equal(model.generate(ids, **settings), expected)
    captured = len(device.captured)
    # By pieces of the model and buckets of tokens, not by step.
    assert captured <= 24
    for _ in range(2):
        assert torch.equal(model.generate(ids, **settings), expected)
    assert len(device.captured) == captured
    assert len([entry for entry in device.log if entry.startswith("replay")]) > 2 * captured


@cpu_only
def test_a_workspace_is_lent_again_and_two_users_never_share_one():
    backbone = by_ops(family("llama"))
    first, second = (backbone.new_cache(10, 3) for _ in range(2))
    assert first.workspace is not second.workspace
    assert (first.workspace.rows, first.workspace.capacity) == (4, 256)
    mine = first.workspace
    mine.keys.fill_(float("nan"))
    del first
    third = backbone.new_cache(10, 4)
    assert third.workspace is mine and bool((mine.keys == 0).all())


@cpu_only
def test_a_longer_generation_outgrows_its_memory():
    model, ids = family("llama"), random_ids(300)
    made = []
    for backbone in (Backbone(model), by_ops(model)):
        with torch.inference_mode():
            cache = backbone.new_cache(4)
            for start, end in ((0, 200), (200, 230), (230, 262)):
                ctx = backbone.context(start, end - start, device="cpu")
                hidden = backbone.embed(ids[:, start:end], ctx)
                hidden = backbone.run_layers(hidden, 0, 4, ctx, cache)
            made.append(backbone.logits(hidden))
    assert close(made[1], made[0]) and cache.workspace.capacity == 512


@cpu_only
def test_weights_written_in_place_or_moved_are_taken_up():
    model, ids = family("llama"), random_ids(20)
    backbone = by_ops(model)
    stepwise(backbone, ids)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.mul_(-1)
    assert close(stepwise(backbone, ids)[0], stepwise(Backbone(model), ids)[0])
    model.float()
    made, cache = stepwise(backbone, ids)
    assert made.dtype == cache.states(0)[0].dtype == torch.float32
    assert close(made, stepwise(Backbone(model), ids)[0], 1e-4)


@cpu_only
def test_folded_keys_follow_weights_written_in_place():
    model = family("llama")
    backbone, state = by_ops(model, boundaries=(1,)), torch.ones(1, 1, 32, dtype=torch.float64)
    for _ in range(2):
        caches = []
        for one in (backbone, Backbone(model)):
            with torch.inference_mode():
                caches.append(cache := one.new_cache())
                one.fill_layers(state, 1, 4, one.context(0, 1, device="cpu"), cache)
        assert close(caches[0].states(3)[0], caches[1].states(3)[0])
        with torch.no_grad():
            model.model.layers[3].self_attn.k_proj.weight.mul_(-1)


@cpu_only
def test_a_capture_that_fails_is_named_once_and_everything_runs_eagerly():
    class Broken(HostDevice):
        tries = 0

        def capture(self, work):
            Broken.tries += 1
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, ids = family("llama"), random_ids(20)
    backbone = by_ops(model, device=Broken())
    made, cache = stepwise(backbone, ids)
    assert close(made, stepwise(Backbone(model), ids)[0])
    reason = "capture failed: operation not permitted when stream is capturing"
    assert backbone.captures.reason == reason and Broken.tries == 1
    assert len(cache.workspace.graphs) == 0
    stepwise(backbone, ids)
    assert Broken.tries == 1


@cpu_only
def test_an_error_of_the_work_itself_is_raised():
    def wrong() -> None:
        raise DeliberateError("shapes do not fit")

    graphs = SegmentGraphs(Captures(HostDevice()))
    with pytest.raises(DeliberateError, match="do not fit"):
        graphs.run("wrong", wrong)


@cpu_only
def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
