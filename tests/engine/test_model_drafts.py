"""Drafts by some of the model's layers, or by its rounded weights: dense's tokens, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.model_drafts import ModelDrafts
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "lookup_tokens": 0}
FAST = ("int4", "int8", (1, 2, 3), (2, 4))


def model_of(name="llama", dtype=torch.float64, executor="generic") -> AdaptiveModel:
    return AdaptiveModel(tiny_model(name, layers=4, dtype=dtype), [1, 2], executor=executor)


@pytest.fixture(scope="module")
def fast() -> AdaptiveModel:
    return model_of(dtype=torch.float32, executor="fused")


@pytest.fixture(scope="module")
def tiny() -> AdaptiveModel:
    return AdaptiveModel.from_pretrained("tiny")


@pytest.fixture
def always(monkeypatch):
    """Four drafts before every pass, whatever they are worth."""
    plain = ModelDrafts.__init__

    def fixed(self, *args, **kwargs):
        plain(self, *args, **kwargs, fixed=4)

    monkeypatch.setattr(ModelDrafts, "__init__", fixed)


def check(model, drafts, ids, **settings):
    """Exact and dense give the same; the trace."""
    how = GREEDY | settings
    dense = model.generate(ids, fidelity="dense", **(how | {"lookup_tokens": None}))
    made = model.generate(ids, fidelity="exact", drafts=drafts, return_dict_in_generate=True, **how)
    assert torch.equal(made.sequences, dense)
    return made.traces[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("layers", [(1,), (4,), (1, 3), (1, 2, 4)])
def test_a_subset_of_the_layers_drafts_what_full_depth_verifies(name, layers, always) -> None:
    model = model_of(name)
    trace = check(model, layers, random_ids(9))
    assert trace.drafted > 40  # nearly four before each of 23 tokens and fewer where accepted
    assert trace.layer_calls[0] == trace.layer_calls[3]  # every pass is of full depth


@pytest.mark.parametrize("drafts", FAST)
@pytest.mark.parametrize("lookup", [0, 4])
def test_rounded_weights_draft_what_float_ones_verify(fast, drafts, lookup, always) -> None:
    trace = check(fast, drafts, random_ids(9), lookup_tokens=lookup)
    assert trace.drafted > trace.rejected


def test_rounded_weights_of_the_bundled_model_are_nearly_always_right(tiny) -> None:
    ids = torch.arange(40, 80).unsqueeze(0)
    trace = check(tiny, "int4", ids, max_new_tokens=60)
    assert trace.drafted > 0  # by what it has measured


def test_sampled_tokens_are_the_seeds_own(fast, always) -> None:
    ids = random_ids(7)
    given = {"do_sample": True, "seed": 5, "top_k": 20, "temperature": 0.7}
    assert check(fast, "int8", ids, **given).drafted > 0
    assert check(fast, (1, 2, 3), ids, repetition_penalty=1.3).drafted > 0


def test_drafts_leave_nothing_in_the_cache_and_run_only_their_layers(always) -> None:
    model, calls = model_of(), [0] * 4
    for at, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(lambda *_, at=at: calls.__setitem__(at, calls[at] + 1))
    trace = check(model, (1, 3), random_ids(9))
    passes = trace.layer_calls[1]
    skipped, run = calls[1], calls[0]
    assert calls[1] == calls[3] and calls[0] == calls[2]
    assert run - skipped == trace.drafted and skipped == passes + 1 + 24  # with both prompts, dense


def test_requests_of_an_engine_draft_each_by_what_it_asked_for(fast, always) -> None:
    engine, wanted, made = fast.engine(max_running=3), {}, {}
    for seed, drafts in enumerate(["int4", (1, 2, 3), None, "int8", (2, 4), "int4"]):
        ids = random_ids(6 + seed, seed=seed)
        dense = fast.generate(ids, fidelity="dense", **(GREEDY | {"lookup_tokens": None}))
        spec = DecodingSpec(fidelity="exact", drafts=drafts, lookup_tokens=0, gate=False)
        number = engine.add(Request(ids[0], 24, spec=spec, end_tokens=()))
        wanted[number], made[number] = dense[0, ids.shape[1] :].tolist(), []
    drafted = 0
    while engine.unfinished:
        for output in engine.step():
            made[output.id] += output.tokens
            drafted += output.trace.drafted if output.trace else 0
    assert made == wanted and drafted > 20


def test_one_that_takes_over_a_row_drafts_by_what_it_asked_for(fast, always) -> None:
    engine, ids = fast.engine(max_running=2), random_ids(8)[0].tolist()
    sources = []
    with engine.constant_weights():
        before: int | None = None
        for drafts in ("int4", (1, 2, 3)):
            spec = DecodingSpec(fidelity="exact", drafts=drafts, lookup_tokens=0, gate=False)
            request = Request(ids, 6, spec=spec, end_tokens=(), hold=True, after=before)
            before = engine.add(request)
            while engine.unfinished:
                for output in engine.step():
                    ids = ids + output.tokens
            sources.append(engine._held[before].sequence.lookup.runner)
    assert sources[0] is not sources[1]
    dense = fast.generate(
        torch.tensor([ids[:8]]),
        fidelity="dense",
        **(GREEDY | {"max_new_tokens": 12, "lookup_tokens": None}),
    )
    assert ids == dense[0].tolist()


def test_changed_weights_are_rounded_anew(always) -> None:
    model = model_of(dtype=torch.float32, executor="fused")
    check(model, "int8", random_ids(9))
    with torch.no_grad():
        for weight in model.base.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    trace = check(model, "int8", random_ids(9))
    assert trace.drafted - trace.rejected > trace.rejected  # those of other weights would not be
    check(copy.deepcopy(model), "int8", random_ids(9))


@pytest.mark.parametrize(
    ("drafts", "settings", "said"),
    [
        ("int2", {}, "drafts='int2': give 'int4', 'int8', 'bf16', or layers"),
        ((3, 1), {}, "or layers numbered from 1, rising"),
        ((), {}, "or layers numbered from 1, rising"),
        ((1, 9), {}, "the model has 4 layers; name some of them, not all"),
        ((1, 2, 3, 4), {}, "the model has 4 layers; name some of them, not all"),
        ("int4", {}, "the C\\+\\+ kernels do not run this model here"),
        ((1, 2), {"fidelity": "dense"}, "fidelity 'dense' verifies no drafts"),
        ((1, 2), {"draft_tokens": 0}, "with draft_tokens=0"),
        ((1, 2), {"kv_storage": "int8"}, "with kv_storage='int8'"),
        ((1, 2), {"thresholds": 0.5}, "drafts=\\(1, 2\\): thresholds and decide are of exits"),
        ((1, 2), {"strict": True}, "strict mode re-runs drafts that exits made"),
    ],
)
def test_what_cannot_draft_is_refused_by_name(drafts, settings, said) -> None:
    model = model_of()
    with pytest.raises(DeliberateError, match=said):
        given = GREEDY | {"fidelity": "exact", "lookup_tokens": None} | settings
        model.generate(random_ids(5), drafts=drafts, **given)


def test_stored_weights_batches_and_caches_in_blocks_are_refused_by_name(fast) -> None:
    stored = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2], weights="int8")
    with pytest.raises(DeliberateError, match="its weights are stored so already"):
        stored.generate(random_ids(5), fidelity="exact", drafts="int8", **GREEDY)
    assert check(stored, "int4", random_ids(5)).drafted >= 0
    ids = random_ids(5).repeat(2, 1)
    with pytest.raises(DeliberateError, match="a batch of 2"):
        fast.generate(ids, fidelity="exact", drafts="int4", **GREEDY)
    cache = fast.backbone_for(2).new_block_cache(20, block_size=4, max_rows=2)
    engine = fast.engine(max_running=2, cache=cache)
    with pytest.raises(DeliberateError, match="whose cache is in blocks"):
        engine.add(Request([1, 2], 4, spec=DecodingSpec(fidelity="exact", drafts=(1, 2))))


def test_a_model_that_became_one_that_cannot_draft_so_names_drafts() -> None:
    model = AdaptiveModel(tiny_model("llama", dtype=torch.float32), [1, 2])
    for name in ("int8", "int4"):
        model.generate(random_ids(5), fidelity="exact", drafts=name, **GREEDY)
    model.base.to(torch.float64)
    for name in ("int8", "int4", "bf16"):  # used before, and not
        with pytest.raises(DeliberateError, match=f"drafts='{name}': .*leave drafts out"):
            model.generate(random_ids(5), fidelity="exact", drafts=name, **GREEDY)
