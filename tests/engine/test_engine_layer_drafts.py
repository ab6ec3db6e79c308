"""A draft layer in an engine: requests that come and go draft by it, and get what dense gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mixed_requests import SPECS, Unsteady, alone, check_same, draw_request, drive
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.layer_drafts import CONTEXT, LayerDrafts
from deliberate.engine.request import Request
from deliberate.engine.scheduler import Scheduler, SchedulerSettings
from deliberate.engine.spec import DecodingSpec
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig

DRAFTING = DecodingSpec(gate=False, fidelity="exact", draft_tokens=4, lookup_tokens=0)
DENSE = DecodingSpec(gate=False, fidelity="dense")


def drafting(dtype=torch.float32) -> AdaptiveModel:
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=dtype), [1, 2])
    torch.manual_seed(0)
    layer = DraftLayer(DraftLayerConfig(model.backbone.hidden_size, 4, 2, 8, 48, VOCAB))
    model.attach_draft(layer)
    return model


@pytest.fixture(scope="module")
def fast() -> AdaptiveModel:
    return drafting()


def fixed(model: AdaptiveModel, monkeypatch, count: int, runner=None) -> list[LayerDrafts]:
    """Drafts so many tokens before every pass, whatever they are worth; the sources, as made."""
    sources, kept = model.draft, []

    def drafts(backbone, most, lookup, rows=None):
        made = type(sources).drafts(sources, backbone, most, lookup, rows)
        own = None if runner is not None else made.shared
        kept.append(LayerDrafts(runner or made.runner, made._lengths, rows=own, fixed=count))
        return kept[-1]

    monkeypatch.setattr(sources, "drafts", drafts)
    return kept


class Knowing:
    """Drafts what dense says, but for every `wrong`-th: after the last tokens of any answer."""

    def __init__(self, texts: list[list[int]], wrong: int) -> None:
        self.wrong, self.made = wrong, 0
        self.after: dict[tuple, int] = {}
        for text in texts:
            self.after |= {tuple(text[at - 3 : at]): text[at] for at in range(3, len(text))}

    class Entries(list):
        length = property(len)

        def crop(self, length):
            del self[length:]

        def close(self):
            self.clear()

    def new_cache(self):
        return self.Entries()

    def extend_rows(self, caches, states, tokens):
        outputs = []
        for cache, own in zip(caches, tokens, strict=True):
            for token in own:
                cache.append(token)
                outputs.append(self.after.get(tuple(cache[-3:]), 0))
        assert len(outputs) == len(states)
        return torch.tensor(outputs)[:, None]

    def read_rows(self, outputs):
        found = []
        for (token,) in outputs.tolist():
            self.made += 1
            found.append(((token + (self.made % self.wrong == 0)) % VOCAB, 0.9))
        return found

    def part(self, *_):
        """The kernels cannot draft by it."""


def text_of(model: AdaptiveModel, request: Request) -> list[int]:
    dense = dataclasses.replace(request, spec=DENSE)
    return [*request.prompt_ids, *alone(model, dense)[0]]


@pytest.mark.parametrize("seed", range(2))
def test_mixed_requests_with_a_draft_layer_get_what_each_gets_alone(fast, seed, monkeypatch):
    kinds = [0, 1, 2, 4, 5]
    requests = []
    for one in range(120):
        request = draw_request(20_000 + 1000 * seed + one, longest=14)
        spec = DecodingSpec(gate=False, **SPECS[kinds[one % 5]])
        if one % 2:
            spec = dataclasses.replace(DRAFTING, draft_tokens=1 + one % 6, lookup_tokens=one % 3)
        requests.append(dataclasses.replace(request, spec=spec))
    texts = [text_of(fast, one) for one in requests if one.spec.draft_tokens]
    known = {id(one): alone(fast, dataclasses.replace(one, spec=DENSE)) for one in requests[1::2]}
    runner = Knowing(texts, 3 + seed)
    fixed(fast, monkeypatch, 3, runner)
    scheduler = Unsteady(seed, 0.1, max_running=6, prefill_tokens=9, idle_prefill_tokens=30)
    engine = fast.engine(max_running=6, scheduler=scheduler)
    results = drive(engine, requests, seed, aborts=0.05)
    assert check_same(fast, results, known) > 80 and runner.made > 30
    stats = engine.stats()
    assert stats.preempted > 5 and stats.aborted > 0
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, 6)


def traces_of(engine, requests):
    numbers = [engine.add(request) for request in requests]
    traces = {}
    while engine.unfinished:
        traces |= {one.id: one.trace for one in engine.step() if one.trace is not None}
    return [traces[number] for number in numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_requests_share_the_calls_of_the_layer_and_give_their_rows_back(dtype, monkeypatch):
    model = drafting(dtype)
    kept = fixed(model, monkeypatch, 3)
    requests = [
        Request(random_ids(5 + 7 * one, seed=one)[0], 20 + one, DRAFTING, end_tokens=())
        for one in range(4)
    ]
    engine, calls = model.engine(max_running=4), []
    expected = [text_of(model, one)[len(one.prompt_ids) :] for one in requests]
    numbers = [engine.add(request) for request in requests]
    executor = kept[0].runner
    assert executor.native is (dtype is torch.float32)
    extend = executor.extend_rows
    monkeypatch.setattr(
        executor,
        "extend_rows",
        lambda caches, *rest: (calls.append(len(caches)), extend(caches, *rest))[1],
    )
    traces = {}
    while engine.unfinished:
        traces |= {one.id: one.trace for one in engine.step() if one.trace is not None}
    assert [traces[number].tokens for number in numbers] == expected
    assert all(traces[number].drafted > 0 for number in numbers)
    assert max(calls) == 4 and sum(calls) > 2 * len(calls)
    rows = kept[0].shared
    assert sorted(rows._free) == list(range(rows.keys.shape[0])) == [0, 1, 2, 3]


def test_entries_written_beside_others_are_those_of_a_sequence_by_itself(fast):
    executor = fast.draft.drafts(fast.backbone, 4, 0).runner
    torch.manual_seed(3)
    shared, counts = executor.new_rows(), [1, 7, 3]
    rows, single = [shared.open() for _ in counts], [executor.new_cache() for _ in counts]
    for _ in range(3):
        states = [torch.randn(count, fast.backbone.hidden_size) for count in counts]
        tokens = [random_ids(count)[0].tolist() for count in counts]
        together = executor.extend_rows(rows, torch.cat(states), tokens).split(counts)
        for cache, given, own, outputs in zip(single, states, tokens, together, strict=True):
            assert executor.extend(cache, given, own).equal(outputs)
        counts = counts[::-1]
    read = executor.read_rows(torch.cat([one[-1:] for one in together]))
    assert read == [executor.read(one[-1:]) for one in together]


def test_a_request_on_shared_blocks_drafts_from_where_states_are_known(fast, monkeypatch):
    kept = fixed(fast, monkeypatch, 2)
    prompt = random_ids(24, seed=5)[0].tolist()  # whole blocks, fewer than CONTEXT
    requests = [Request([*prompt, n], 8, DRAFTING, end_tokens=()) for n in range(3)]
    cache = fast.backbone_for(2).new_block_cache(64, block_size=4, max_rows=1)
    settings = SchedulerSettings(max_running=1, block_tokens=4)
    engine = fast.engine(max_running=1, cache=cache, scheduler=Scheduler(settings))
    numbers = [engine.add(request) for request in requests]
    begun, traces = {}, {}
    while engine.unfinished:
        outputs = engine.step()
        begun |= {source: source._first for source in kept if source.entries}
        traces |= {one.id: one.trace for one in outputs if one.trace is not None}
    assert [begun[source] for source in kept] == [0, 24, 24]
    assert engine.stats().prefilled == 25 + 1 + 1
    for number, request in zip(numbers, requests, strict=True):
        assert traces[number].tokens == text_of(fast, request)[25:]
        assert traces[number].drafted > 0


def test_a_preempted_request_drafts_on_from_the_states_of_its_refill(fast, monkeypatch):
    request = Request(random_ids(9, seed=4)[0], 40, DRAFTING, end_tokens=())
    kept = fixed(fast, monkeypatch, 2, Knowing([text_of(fast, request)], 4))
    engine = fast.engine(max_running=2)
    number = engine.add(request)
    for _ in range(3):
        engine.step()
    (source,), entry = kept, engine._running[number]
    made = len(entry.sequence.records)
    assert source.entries > 9
    engine._preempt(entry)
    assert source.entries == 0
    outputs = engine.step()  # the refill
    while not source.entries:
        outputs += engine.step()
    assert source._first == 0 and source.entries >= 9 + made - 1
    while engine.unfinished:
        outputs += engine.step()
    assert outputs[-1].trace.tokens == text_of(fast, request)[9:]


def test_beside_requests_with_exits_no_state_is_missed(fast, monkeypatch):
    kept = fixed(fast, monkeypatch, 2)
    exits = DecodingSpec(gate=False, fidelity="exact", thresholds=0.02, online=False)
    requests = [
        Request(random_ids(6, seed=one)[0], 24, (DRAFTING, exits)[one % 2], end_tokens=())
        for one in range(4)
    ]
    engine, missed = fast.engine(max_running=4), []
    start_at = LayerDrafts._start_at

    def noted(source, position):
        missed.append((source, position))
        start_at(source, position)

    monkeypatch.setattr(LayerDrafts, "_start_at", noted)
    for trace, request in zip(traces_of(engine, requests), requests, strict=True):
        assert trace.tokens == text_of(fast, request)[6:]
    assert {position for source, position in missed if source in kept} == {0}


def test_the_layer_reads_the_newest_states_of_a_long_prompt(fast, monkeypatch):
    kept = fixed(fast, monkeypatch, 1)
    long, most = random_ids(3 * CONTEXT)[0], []
    engine = fast.engine(max_running=2)
    engine.add(Request(long, 6, DRAFTING, end_tokens=()))
    runner = kept[0].runner
    extend = runner.extend_rows
    monkeypatch.setattr(
        runner,
        "extend_rows",
        lambda caches, states, tokens: (most.append(len(states)), extend(caches, states, tokens))[
            1
        ],
    )
    while engine.unfinished:
        engine.step()
    assert max(most) == CONTEXT


def test_drafts_are_as_long_as_pays_at_the_load():
    lengths = DraftLengths(DraftPrior(), 4)
    busy = lengths.of_load(8)
    assert busy is lengths.of_load(5) is not lengths.of_load(4) and lengths.of_load(1) is lengths
    busy.note_single(1.0)
    for _ in range(40):
        busy.note_pass([0.5] * 4, 1, 1.0 + 4 * 0.9)
    assert not busy.pays
    assert sum(busy.begin() for _ in range(64)) <= 8
