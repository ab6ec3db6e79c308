"""Several passes with drafts in one call of the C++ kernels do what pass by pass does."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine import ngram_drafts
from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.draft_plan import CALL_SECONDS, call_passes
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.engine.request import Request
from deliberate.engine.sequence import LaterEnds
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.fused.native import NativeMultiStep
from deliberate.executors.fused.static_cache import StaticCache
from deliberate.kernels import native_build
from deliberate.kernels.native_drafted import DraftedPass, DraftedTokens
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.train.draft.hidden_cache import run_text

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


def adaptive(arch="llama", likely=None, **settings) -> AdaptiveModel:
    """With a draft layer that knows the `likely` tokens only, so that some drafts are right."""
    model = AdaptiveModel(tiny_model(arch, dtype=torch.float32, **settings), [1, 2])
    torch.manual_seed(0)
    tokens = torch.arange(VOCAB) if likely is None else torch.tensor(sorted(likely))
    layer = DraftLayer(DraftLayerConfig(model.backbone.hidden_size, 4, 2, 8, 48, len(tokens)))
    layer.vocabulary.copy_(tokens)
    model.attach_draft(layer)
    return model


def knowing(prompt, arch="llama", **settings) -> AdaptiveModel:
    """A model whose draft layer knows the tokens of its own answer to a prompt only."""
    plain = adaptive(arch, **settings)
    made = plain.generate(prompt, max_new_tokens=40, fidelity="dense", eos_token_id=None)
    return adaptive(arch, likely=set(made[0, prompt.shape[1] :].tolist()), **settings)


def frozen(model, monkeypatch, layer, lookup):
    """Drafts that depend on no measured time: `layer` by the layer, and all that are looked up."""
    sources, kept = model.draft, []

    def drafts(backbone, most, found, rows=None):
        made = type(sources).drafts(sources, backbone, most, found, rows)
        if not layer:
            kept.append(NgramDrafts(lookup))
        else:
            own = NgramDrafts(lookup) if lookup else None
            kept.append(LayerDrafts(made.runner, made._lengths, lookup=own, fixed=layer))
        return kept[-1]

    monkeypatch.setattr(sources, "drafts", drafts)
    monkeypatch.setattr(NgramDrafts, "_best", lambda _self, most: most)
    monkeypatch.setattr(NgramDrafts, "plain_passes", 1)  # pass by pass asks before each
    for name in ("_ALLOWANCE", "_MOST_ALLOWANCE"):
        monkeypatch.setattr(ngram_drafts, name, math.inf)
    return kept


def account(model, prompt, **settings):
    how = {"max_new_tokens": 40, "eos_token_id": None} | settings
    out = model.generate(prompt, return_dict_in_generate=True, **how)
    trace = out.trace
    return {
        "tokens": out.sequences[0].tolist(),
        "layers": [(one.exit_layer, one.verified, one.rounds) for one in trace.records],
        "calls": (list(trace.layer_calls), list(trace.layer_positions)),
        "drafted": (trace.drafted, trace.rejected, trace.discarded),
        "passes": list(out.batch.passes),
        "finish": trace.finish,
    }


def pass_by_pass(monkeypatch, model, prompt, **settings):
    with monkeypatch.context() as patch:
        patch.setattr(MultiStep, "drafted", lambda *_: False)
        return account(model, prompt, **settings)


@pytest.fixture
def calls(monkeypatch):
    """Passes of each call of the executor that drafted."""
    made, decode = [], NativeMultiStep.decode_drafted

    def counted(self, *args, **how):
        found = decode(self, *args, **how)
        made.append(len(found.passes))
        return found

    monkeypatch.setattr(NativeMultiStep, "decode_drafted", counted)
    return made


@pytest.mark.parametrize(("layer", "lookup"), [(1, 0), (4, 0), (0, 5), (3, 4)])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_tokens_counts_and_layers_are_those_of_pass_by_pass(
    monkeypatch, calls, arch, layer, lookup
):
    accepted = 0
    for prompt in (random_ids(9), torch.tensor([[7, 3, 11, 5] * 4])):
        model = knowing(prompt, arch)
        dense = model.generate(prompt, max_new_tokens=40, fidelity="dense", eos_token_id=None)
        frozen(model, monkeypatch, layer, lookup)
        wanted = pass_by_pass(monkeypatch, model, prompt)
        calls.clear()
        assert account(model, prompt) == wanted
        assert wanted["tokens"] == dense[0].tolist()
        assert sum(calls) > len(calls) > 0
        drafted, _, discarded = wanted["drafted"]
        accepted += drafted - discarded
    assert accepted > 0 or not layer


@pytest.mark.parametrize("left", range(1, 12))
def test_the_output_ends_where_dense_ends_it(monkeypatch, calls, left):
    prompt = random_ids(9)
    model = knowing(prompt)
    frozen(model, monkeypatch, 3, 4)
    answer = model.generate(prompt, max_new_tokens=40, fidelity="dense", eos_token_id=None)
    end = int(answer[0, 9 + left])
    for settings in ({"max_new_tokens": left}, {"eos_token_id": end}):
        dense = model.generate(prompt, fidelity="dense", **({"max_new_tokens": 40} | settings))
        for _ in range(2):  # the second answer has measured the passes: there are several a call
            found = account(model, prompt, **settings)
        assert found["tokens"] == dense[0].tolist()
        assert found == pass_by_pass(monkeypatch, model, prompt, **settings)


def test_entries_after_a_call_equal_those_computed_anew(monkeypatch):
    prompt = random_ids(9)
    model = knowing(prompt)
    kept = frozen(model, monkeypatch, 3, 0)
    for tokens in (30, 40):
        ids = model.generate(prompt, max_new_tokens=tokens, eos_token_id=None)[0].tolist()
    source = kept[-1]
    entries = source.entries
    assert entries > 25
    (before,) = run_text(model.backbone, ids[: entries + 1], [model.backbone.num_layers])
    fresh = source.runner.new_cache()
    source.runner.extend(fresh, before[:-1], ids[1 : entries + 1])
    for name in ("keys", "values"):
        held, anew = getattr(source.cache, name), getattr(fresh, name)
        assert torch.allclose(held[:, :, :entries], anew[:, :, :entries], atol=1e-4)


def test_a_lone_request_of_an_engine_drafts_in_calls_that_fit_its_blocks(calls):
    prompt = random_ids(9)
    model = knowing(prompt)
    dense = model.generate(prompt, max_new_tokens=40, fidelity="dense", eos_token_id=None)
    spec = DecodingSpec(gate=False, fidelity="exact", draft_tokens=3, lookup_tokens=3)
    engine, made = model.engine(max_running=2), []
    for _ in range(2):
        engine.add(Request(prompt[0].tolist(), 40, spec, end_tokens=()))
        made.append([])
        while engine.unfinished:
            for output in engine.step():
                made[-1] += output.tokens
    assert made == [dense[0, 9:].tolist()] * 2
    assert calls and engine.stats().running == 0


@pytest.mark.parametrize(("layer", "lookup"), [(3, 0), (0, 5)])
@pytest.mark.parametrize("after", [0, 6, 12])
def test_a_token_that_ends_an_output_from_some_token_on_ends_it_in_calls(
    calls, monkeypatch, layer, lookup, after
):
    prompt = random_ids(9)
    model = knowing(prompt)
    dense = model.generate(prompt, max_new_tokens=40, fidelity="dense", eos_token_id=None)
    answer = dense[0, 9:].tolist()
    frozen(model, monkeypatch, layer, lookup)
    spec = DecodingSpec(gate=False, fidelity="exact", draft_tokens=layer, lookup_tokens=lookup)
    engine = model.engine(max_running=2)
    for at in (after, after + 3, after + 9):
        end = answer[at]
        wanted = answer[: answer.index(end, after) + 1]
        for _ in range(2):
            engine.add(
                Request(
                    prompt[0].tolist(),
                    40,
                    spec,
                    end_tokens=(),
                    later_ends=LaterEnds(after, frozenset({end})),
                )
            )
            made = []
            while engine.unfinished:
                for output in engine.step():
                    made += output.tokens
            assert made == wanted
    assert calls


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "seed": 3},
        {"repetition_penalty": 1.2},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
)
def test_what_must_be_looked_at_between_two_tokens_is(monkeypatch, calls, settings):
    prompt = random_ids(9)
    model = knowing(prompt)
    frozen(model, monkeypatch, 3, 0)
    model.generate(prompt, max_new_tokens=20, eos_token_id=None, **settings)
    assert not calls
    model.generate(prompt, max_new_tokens=20, eos_token_id=None)
    assert calls


def test_one_call_teaches_the_estimates_what_its_passes_do():
    passes = [
        DraftedPass(2, 0, 1, [0.9, 0.4], [0.01], 0.02, 1.1),
        DraftedPass(1, 0, 1, [0.95], [], 0.01, 1.05),
        DraftedPass(0, 0, 0, [], [], 0.01, 1.0),
    ]
    together, each = (DraftLengths(DraftPrior(), 4) for _ in range(2))

    class Silent:
        length = 0

        def new_cache(self):
            return self

        def crop(self, length):
            self.length = min(self.length, length)

    source = LayerDrafts(Silent(), together)
    source.note_passes(DraftedTokens(passes, [1] * 5, torch.zeros(5, 1), 4, 0), 0, 2.0)
    each.note_draft(0.02)
    each.note_pass([0.9, 0.4], 1, 2.2)
    each.note_time(2.24, 2)
    each.note_pass([0.95], 1, 2.1)
    each.note_time(2.12, 2)
    each.note_single(2.0)
    each.note_time(2.02, 1)
    assert together.rule(4) == each.rule(4)
    assert source.entries == 4


def test_a_call_takes_about_as_long_at_any_speed():
    assert call_passes(None) == 1 == call_passes(2 * CALL_SECONDS)
    assert call_passes(CALL_SECONDS / 2.5) == 2
    assert call_passes(1e-9) == call_passes(0.0) == 8


@pytest.mark.parametrize("new", [7, 40])
def test_a_cache_that_has_room_for_the_answer_is_not_grown(new, monkeypatch) -> None:
    model, ids, grown = adaptive(), random_ids(9), []
    grow = StaticCache._grow

    def noted(cache, layer, needed, *states) -> None:
        grown.append(cache._capacities[layer])
        grow(cache, layer, needed, *states)

    monkeypatch.setattr(StaticCache, "_grow", noted)
    model.generate(ids, max_new_tokens=new, fidelity="exact", eos_token_id=None)
    assert grown and not any(grown)  # made once, of nothing
