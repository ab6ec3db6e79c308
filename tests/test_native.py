"""The C++ kernels: right at odd shapes, the same whoever rides along, and never in the way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_fused import FAMILIES, close, stepwise
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.backbone import Backbone
from deliberate.config import ExitConfig, Measure
from deliberate.exits import ExitReader
from deliberate.fused.backbone import FusedBackbone, FusedReader
from deliberate.fused.engine import Engine
from deliberate.kernels import native_build
from deliberate.model import AdaptiveModel
from deliberate.pacing import FixedPacer
from deliberate.quantise import widened

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


# -- the same numbers ------------------------------------------------------------------------------


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
    assert close(stepwise(backbone, ids)[0].double(), stepwise(Backbone(reference), ids)[0])


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


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("translator", ["low_rank", "full", "none"])
@pytest.mark.parametrize("measure", [Measure.MAX_PROB, Measure.MARGIN, Measure.ENTROPY])
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
        wanted, made = (reader.look(index, states, 0.3) for reader in (theirs, ours))
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
        confidences = reader.look(0, states, 0.0).confidences
        assert math.isnan(confidences[0]) and 0.0 < confidences[1] <= 1.0


# -- several steps in one call ---------------------------------------------------------------------


def account(adaptive: AdaptiveModel, prompt: torch.Tensor, **settings):
    out = adaptive.generate(
        prompt, max_new_tokens=24, return_dict_in_generate=True, online=False, **settings
    )
    trace = out.trace
    return {
        "tokens": out.sequences[0].tolist(),
        "exits": [record.exit_layer for record in trace.records],
        "verified": [record.verified for record in trace.records],
        "calls": list(trace.layer_calls),
        "positions": list(trace.layer_positions),
        "drafted": (trace.drafted, trace.rejected, trace.discarded),
        "finish": trace.finish,
    }


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
@pytest.mark.parametrize(
    "thresholds", [(0.0, 0.0, 0.0), (0.12, 0.12, 0.12), (math.inf, 0.12, math.inf)]
)
@pytest.mark.parametrize("end", [None, 41])
def test_steps_ahead_do_what_single_steps_do(monkeypatch, fidelity, thresholds, end):
    base = single("llama", layers=5)
    base.generation_config.eos_token_id = end
    adaptive = AdaptiveModel(base, [1, 2, 3], executor="fused", engine="native")
    settings = {"fidelity": fidelity}
    if fidelity != "dense":
        settings["pacer"] = FixedPacer(thresholds)
    for seed in range(3):
        prompt = random_ids(7, seed=seed)
        ahead = account(adaptive, prompt, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(FusedBackbone, "ahead", lambda *_: None)
            assert account(adaptive, prompt, **settings) == ahead


def test_drafting_needs_one_call_for_a_run_of_tokens(monkeypatch):
    adaptive = AdaptiveModel(single("llama"), [1], executor="fused", engine="native")
    calls = []
    run = FusedBackbone.run_layers
    monkeypatch.setattr(
        FusedBackbone,
        "run_layers",
        lambda self, hidden, first, last, *rest: (
            calls.append((first, last, hidden.shape[1])) or run(self, hidden, first, last, *rest)
        ),
    )
    adaptive.generate(
        random_ids(7), max_new_tokens=40, fidelity="threshold", thresholds=1e-6, online=False
    )
    assert {(first, last) for first, last, _ in calls[1:]} == {(1, 4)}


# -- having them -----------------------------------------------------------------------------------


def test_float32_models_take_the_kernels_and_others_do_not():
    assert FusedBackbone(single("llama")).engine is Engine.NATIVE
    assert FusedBackbone(tiny_model("llama")).engine is not Engine.NATIVE


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing is compiled yet."""
    monkeypatch.setenv("DELIBERATE_CACHE", str(tmp_path))
    native_build.load.cache_clear()
    yield tmp_path
    native_build.load.cache_clear()


def test_turned_off_they_give_way_by_name(anew, monkeypatch):
    monkeypatch.setenv("DELIBERATE_NATIVE", "0")
    assert native_build.unavailable() == "DELIBERATE_NATIVE=0 is set"
    assert FusedBackbone(single("llama")).engine is not Engine.NATIVE


def test_a_compiler_that_fails_is_named_in_one_line_and_leaves_nothing(anew, monkeypatch):
    broken = anew / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x: error: no'; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    reason = native_build.unavailable()
    assert reason is not None and reason.startswith("compilation failed") and "\n" not in reason
    assert not list((anew / "native").iterdir())


def test_no_compiler_is_a_reason(anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_build.unavailable() == "no C++ compiler is found (no-such-compiler)"


def test_what_was_compiled_once_is_loaded(anew, monkeypatch):
    assert native_build.unavailable() is None
    (made,) = (anew / "native").glob("*.so")
    native_build.load.cache_clear()
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert native_build.unavailable() is None and made.is_file()
