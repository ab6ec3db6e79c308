"""Requests that are held after their end, and those that go on in their rows."""

from __future__ import annotations

import pytest
from tiny_models import random_ids, tiny_model

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.cache.block_cache import BlockCache
from deliberate.engine.engine import Engine
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.utils.errors import DeliberateError

DENSE = DecodingSpec(fidelity="dense", gate=False)
SPECS = {
    "dense": DENSE,
    "exact": DecodingSpec(fidelity="exact", thresholds=0.013, online=False, gate=False),
    "threshold": DecodingSpec(fidelity="threshold", thresholds=0.05, gate=False),
    "lossy": DecodingSpec(fidelity="threshold", thresholds=0.05, kv_mode="skip", gate=False),
}
PROMPT = random_ids(21, seed=3)[0].tolist()
ASIDE = [5, 9, 2]


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama"), executor="generic")


def answered(engine: Engine, request: Request) -> tuple[int, list[int]]:
    number, made = engine.add(request), []
    while engine.unfinished:
        for output in engine.step():
            made += output.tokens if output.id == number else []
    return number, made


def blocks(model: AdaptiveModel, count: int = 40, rows: int = 2) -> BlockCache:
    return model.backbone_for(2).new_block_cache(count, block_size=8, max_rows=rows)


def ask(prompt, new, spec=DENSE, **how) -> Request:
    return Request(prompt, new, spec, end_tokens=(), **how)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["rows", "blocks"])
def test_what_follows_in_a_row_taken_over_is_what_follows_anew(llama, name, kind):
    spec = SPECS[name]
    cache = blocks(llama) if kind == "blocks" else None
    engine = llama.engine(max_running=2, cache=cache)
    fresh = llama.engine(max_running=2)
    with engine.constant_weights():
        first, made = answered(engine, ask(PROMPT, 13, spec, hold=True))
        # A fork of fewer tokens than the request had made, with other tokens after them.
        fork = [*PROMPT, *made[:9], *ASIDE]
        second, said = answered(engine, ask(fork, 6, hold=True, after=first))
        on = [*PROMPT, *made[:9]]
        third, rest = answered(engine, ask(on, 12, spec, after=second))
    assert said == answered(fresh, ask(fork, 6))[1]
    assert rest == answered(fresh, ask(on, 12, spec))[1]
    if spec.fidelity != "threshold":
        assert rest[:4] == made[9:]
    assert not engine.release(third)


def test_only_what_is_new_is_run(llama):
    engine = llama.engine(max_running=1)
    with engine.constant_weights():
        first, made = answered(engine, ask(PROMPT, 10, hold=True))
        before = engine.stats().prefilled
        second, _ = answered(engine, ask([*PROMPT, *made, *ASIDE], 4, hold=True, after=first))
        assert engine.stats().prefilled - before == 1 + len(ASIDE)  # and the newest token
        before = engine.stats().prefilled
        fork = [*PROMPT, *made[:-1], *ASIDE]
        answered(engine, ask(fork, 4, after=second))
        assert engine.stats().prefilled - before == len(ASIDE)


def test_a_held_row_is_given_up_where_another_request_needs_it(llama):
    engine = llama.engine(max_running=1, cache=blocks(llama, count=8, rows=1))
    alone = llama.engine(max_running=1)
    long = random_ids(40, seed=5)[0].tolist()
    with engine.constant_weights():
        first, made = answered(engine, ask(PROMPT, 10, hold=True))
        assert answered(engine, ask(long, 9))[1] == answered(alone, ask(long, 9))[1]
        assert not engine.release(first)
        assert (
            answered(engine, ask([*PROMPT, *made], 5, after=first))[1]
            == (answered(alone, ask([*PROMPT, *made], 5))[1])
        )


def test_nothing_is_held_once_the_weights_may_change(llama):
    cache = blocks(llama)
    engine = llama.engine(max_running=2, cache=cache)
    with engine.constant_weights():
        first, _ = answered(engine, ask(PROMPT, 4, hold=True))
        assert cache.tables.open_rows
    assert not cache.tables.open_rows
    assert not engine.release(first)
    cache.check()
    with pytest.raises(DeliberateError, match=r"hold=True outside Engine.constant_weights"):
        engine.add(ask(PROMPT, 4, hold=True))


def test_a_window_that_has_moved_on_makes_a_request_begin_anew():
    model = AdaptiveModel(tiny_model("mistral", sliding_window=8), executor="generic")
    engine = model.engine(max_running=1, cache=blocks(model, rows=1))
    alone = model.engine(max_running=1)
    with engine.constant_weights():
        first, made = answered(engine, ask(PROMPT, 30, hold=True))
        on = [*PROMPT, *made[:3]]
        assert answered(engine, ask(on, 8, after=first))[1] == answered(alone, ask(on, 8))[1]


def test_looked_up_drafts_know_the_text_after_a_probe():
    model = AdaptiveModel.from_pretrained("tiny")
    tokenizer = checkpoint.load_tokenizer("tiny")
    spec = DecodingSpec(fidelity="exact", lookup_tokens=4, gate=False)
    prompt = tokenizer.encode("Question: Tom has 3 apples and buys 4 more. Tom has 3 apples and")
    engine = model.engine(max_running=1)
    with engine.constant_weights():
        first, made = answered(engine, ask(prompt, 12, spec, hold=True))
        drafts = engine._held[first].sequence.lookup
        assert drafts is not None
        probe, _ = answered(engine, ask([*prompt, *made, *ASIDE], 3, hold=True, after=first))
        assert engine._held[probe].sequence.lookup is None
        last, rest = answered(engine, ask([*prompt, *made], 12, spec, hold=True, after=probe))
        assert engine._held[last].sequence.lookup is drafts
    assert made + rest == answered(model.engine(), ask(prompt, 24))[1]


def test_a_spec_is_resolved_once_while_the_weights_are_constant_and_limits_are_each_requests(llama):
    engine, resolved = llama.engine(max_running=1), []
    resolve = engine._resolve
    engine._resolve = lambda request, running: resolved.append(1) or resolve(request, running)
    alone = answered(engine, ask(PROMPT, 9))[1]
    assert len(resolved) == 1
    with engine.constant_weights():
        assert answered(engine, ask(PROMPT, 4))[1] == alone[:4]
        ends = Request(PROMPT, 9, DENSE, end_tokens=[alone[2]])
        assert answered(engine, ends)[1] == alone[: alone.index(alone[2]) + 1]
        assert answered(engine, ask(PROMPT, 9))[1] == alone
        assert len(resolved) == 2
        exact = ask(PROMPT, 9, SPECS["exact"])
        assert answered(engine, exact)[1] == alone
        assert len(resolved) == 3
    answered(engine, ask(PROMPT, 1))
    assert len(resolved) == 4


def test_the_confidence_of_a_request_is_that_of_full_depth():
    model = AdaptiveModel(tiny_model("llama"), executor="generic")
    engine = model.engine(max_running=1)
    number = engine.add(ask(PROMPT, 6, confidences=True, top_logprobs=1))
    traces, logprobs = [], []
    while engine.unfinished:
        for output in engine.step():
            logprobs += output.logprobs
            traces += [output.trace] if output.trace else []
    found = [record.confidence for record in traces[0].records]
    assert number == 0
    assert found == pytest.approx([2.718281828459045**one.logprob for one in logprobs], rel=1e-4)


@pytest.mark.parametrize("changes", [{"hold": 1}, {"after": "3"}, {"confidences": None}])
def test_a_value_that_is_none_of_its_kind_is_refused_by_name(changes):
    with pytest.raises(DeliberateError, match=next(iter(changes))):
        ask(PROMPT, 4, **changes)


@pytest.mark.parametrize("name", ["dense", "exact"])
def test_a_token_that_is_newest_in_a_row_taken_over_is_decoded_and_not_prefilled(llama, name):
    spec = SPECS[name]
    engine = llama.engine(max_running=2)
    with engine.constant_weights():
        first, made = answered(engine, ask(PROMPT, 10, spec, hold=True))
        before = engine.stats().prefilled
        on, rest = answered(engine, ask([*PROMPT, *made], 9, spec, hold=True, after=first))
        again, last = answered(engine, ask([*PROMPT, *made, *rest[:3]], 6, spec, after=on))
        assert engine.stats().prefilled == before
    whole = answered(llama.engine(), ask(PROMPT, 19))[1]
    assert made + rest == whole
    assert last == rest[3:]
    assert not engine.release(again)


def test_a_row_taken_over_that_is_preempted_before_its_first_token_goes_on_as_alone(llama):
    spec = SPECS["exact"]
    engine = llama.engine(max_running=2, cache=blocks(llama))
    with engine.constant_weights():
        first, made = answered(engine, ask(PROMPT, 10, spec, hold=True))
        number = engine.add(ask([*PROMPT, *made], 9, spec, after=first))
        engine._preempt(engine._running[number])
        rest = []
        while engine.unfinished:
            rest += [token for output in engine.step() for token in output.tokens]
    assert made + rest == answered(llama.engine(), ask(PROMPT, 19))[1]
