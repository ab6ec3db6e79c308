"""Drafts by the model itself in one call of the C++ kernels: what pass by pass does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.model_drafts import ModelDrafts
from deliberate.engine.multi_step import MultiStep
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.executors.fused.native import NativeMultiStep
from deliberate.kernels import native_build

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
SOURCES = ("int4", "int8", (1, 2, 3), (2, 4), (4,))


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])


@pytest.fixture
def calls(monkeypatch):
    """Passes of each call that drafted; drafts depend on no measured time: four before each."""
    made, decode, plain = [], NativeMultiStep.decode_drafted, ModelDrafts.__init__

    def counted(self, *args, **how):
        found = decode(self, *args, **how)
        assert how["model"] is not None
        made.append(len(found.passes))
        return found

    def fixed(self, *args, **kwargs):
        plain(self, *args, **kwargs, fixed=4)

    monkeypatch.setattr(NativeMultiStep, "decode_drafted", counted)
    monkeypatch.setattr(ModelDrafts, "__init__", fixed)
    monkeypatch.setattr(NgramDrafts, "_best", lambda _self, most: most)
    return made


def account(model, ids, drafts, **settings):
    how = {"max_new_tokens": 40, "eos_token_id": None, "lookup_tokens": 0} | settings
    out = model.generate(ids, fidelity="exact", drafts=drafts, return_dict_in_generate=True, **how)
    trace = out.trace
    counts = trace.drafted, trace.rejected, trace.discarded, trace.layer_calls, trace.finish
    return out.sequences[0].tolist(), counts, list(out.batch.passes)


def pass_by_pass(monkeypatch, *args, **settings):
    with monkeypatch.context() as patch:
        patch.setattr(MultiStep, "drafted", lambda *_: False)
        return account(*args, **settings)


@pytest.mark.parametrize("drafts", SOURCES)
@pytest.mark.parametrize("lookup", [0, 4])
def test_the_tokens_counts_and_passes_are_those_of_pass_by_pass(
    model, monkeypatch, calls, drafts, lookup
):
    for ids in (random_ids(9), torch.tensor([[7, 3, 11, 5] * 4])):
        dense = model.generate(ids, max_new_tokens=40, fidelity="dense", eos_token_id=None)
        wanted = pass_by_pass(monkeypatch, model, ids, drafts, lookup_tokens=lookup)
        calls.clear()
        for _ in range(2):  # the second answer has measured the passes: there are several a call
            assert account(model, ids, drafts, lookup_tokens=lookup) == wanted
        assert wanted[0] == dense[0].tolist()
        assert sum(calls) > len(calls) > 0


@pytest.mark.parametrize("left", range(1, 9))
def test_the_output_ends_where_dense_ends_it(model, monkeypatch, calls, left):
    ids = random_ids(9)
    answer = model.generate(ids, max_new_tokens=40, fidelity="dense", eos_token_id=None)
    for settings in ({"max_new_tokens": left}, {"eos_token_id": int(answer[0, 9 + left])}):
        dense = model.generate(ids, fidelity="dense", **({"max_new_tokens": 40} | settings))
        made = account(model, ids, "int8", **settings)
        assert made[0] == dense[0].tolist()
        assert made == pass_by_pass(monkeypatch, model, ids, "int8", **settings)


def test_lone_requests_of_an_engine_draft_in_calls_whichever_their_row(model, calls):
    engine, made, wanted = model.engine(max_running=3), {}, {}
    for seed, drafts in enumerate(("int8", (1, 2, 3), "int4")):
        ids, tokens = random_ids(6 + seed, seed=seed), 12 * (seed + 1)
        dense = model.generate(ids, fidelity="dense", max_new_tokens=tokens, eos_token_id=None)
        spec = DecodingSpec(fidelity="exact", drafts=drafts, lookup_tokens=0, gate=False)
        number = engine.add(Request(ids[0], tokens, spec=spec, end_tokens=()))
        wanted[number], made[number] = dense[0, ids.shape[1] :].tolist(), []
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
    assert made == wanted
    assert calls  # of the longest, in the third row, once the others have ended


@pytest.mark.parametrize("settings", [{"do_sample": True, "seed": 3}, {"repetition_penalty": 1.2}])
def test_what_must_be_looked_at_between_two_tokens_is(model, calls, settings):
    account(model, random_ids(9), "int8", **settings)
    assert not calls


def test_changed_weights_draft_in_calls_anew(calls):
    own = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    account(own, random_ids(9), "int8")
    with torch.no_grad():
        for weight in own.base.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    calls.clear()
    dense = own.generate(random_ids(9), max_new_tokens=40, fidelity="dense", eos_token_id=None)
    tokens, (drafted, rejected, *_), _ = account(own, random_ids(9), "int8")
    assert calls and tokens == dense[0].tolist()
    assert drafted - rejected > rejected  # those of the weights before would not be


def test_a_call_counts_the_time_of_its_drafts():
    lengths = DraftLengths(DraftPrior(), 4)
    runner = SimpleNamespace(part=lambda *_: "part", new_cache=None)
    source = ModelDrafts(runner, lengths, fixed=2)
    for draft, passes in ((0.0001, 4), (0.005, 2), (0.1, 1)):
        lengths.note_single(0.01)
        lengths._draft = None
        lengths.note_draft(draft)
        assert source.plan([1, 2], 40).passes == passes


def test_few_observations_outweigh_a_guessed_prior():
    guessed, measured = DraftLengths(DraftPrior(), 4, weight=16.0), DraftLengths(DraftPrior(), 4)
    for one in (guessed, measured):
        for _ in range(20):
            one.note_pass([0.15], 1, 1.0)
    assert guessed.accepts(0.15) > 0.9 > 0.6 > measured.accepts(0.15)
    shared = guessed.of_load(4)
    for _ in range(20):
        shared.note_pass([0.15], 1, 1.0)
    assert shared.accepts(0.15) > 0.9
