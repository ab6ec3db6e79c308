"""Passes of a batch: which sequences a pass serves, and what is kept between passes."""

from __future__ import annotations

import itertools

import pytest
from batch_decoding import NEW, make_loop, prompts, together
from tiny_models import left_padded, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.config import Fidelity
from deliberate.engine.scheduler import DeepSchedule


@pytest.fixture(scope="module")
def llama() -> AdaptiveModel:
    return AdaptiveModel(tiny_model("llama", layers=6), [1, 2, 4])


def test_a_sequence_that_can_go_on_shallow_is_not_held_up_by_one_that_cannot(llama):
    # Tokens of sequence 0 never exit early, those of the others always do.
    loop = make_loop(
        llama,
        Fidelity.THRESHOLD,
        decide=lambda _exit, sequence, _confidence: sequence > 0,
        schedule=DeepSchedule(fullness=1.0, max_wait=4, join=2.0),
        max_pending=NEW,
    )
    list(loop.run(prompts(4, 5, 6)))
    shallow = [p for p in loop.batch.passes if p.segment == 0]
    # While sequence 0 waits for its first deep pass the two others go on.
    assert [p.rows for p in shallow[:5]] == [3, 2, 2, 2, 2]
    blocked_passes = 0
    for one in loop.batch.passes:
        blocked_passes = 0 if one.segment else blocked_passes + (one.rows < 3)
        assert blocked_passes <= 4, "no sequence waits longer than the bound"


@pytest.mark.parametrize(("join", "rows"), [(0.5, 2), (2.0, 1)])
def test_a_sequence_with_many_pending_drafts_joins_the_deep_pass_of_another(llama, join, rows):
    loop = make_loop(
        llama,
        decide=lambda _exit, sequence, _confidence: sequence > 0,
        schedule=DeepSchedule(fullness=1.0, max_wait=4, join=join),
        max_new_tokens=NEW,
    )
    list(loop.run(prompts(4, 5)))
    # Five drafts are pending of the second sequence, of at most six, when the first is due.
    assert next(one.rows for one in loop.batch.passes if one.segment) == rows


def test_deep_passes_are_fewer_and_fuller_than_one_for_every_blocked_sequence(llama):
    script = itertools.cycle([True, True, False, True, False, True, True])

    def deep_passes(fullness: float) -> tuple[int, float]:
        loop = make_loop(
            llama,
            decide=lambda *_: next(script),
            schedule=DeepSchedule(fullness=fullness, max_wait=50, join=2.0),
            max_new_tokens=40,
        )
        list(loop.run(prompts(4, 5, 6, 7)))
        deep = [p for p in loop.batch.passes if p.segment]
        return len(deep), sum(p.rows for p in deep) / len(deep)

    eager, full = deep_passes(0.25), deep_passes(1.0)
    assert full[0] < eager[0]
    assert full[1] > eager[1]


def test_layers_are_counted_as_hooks_count_them_in_a_batch(llama):
    calls = [0] * 6
    handles = [
        layer.register_forward_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
        for index, layer in enumerate(llama.backbone.layers)
    ]
    try:
        ids, mask = left_padded([3, 8, 5])
        out = together(llama, ids, mask, thresholds=0.05, max_new_tokens=NEW)
    finally:
        for handle in handles:
            handle.remove()
    assert [count - 1 for count in calls] == out.batch.layer_calls  # one call is the prompts'
    assert out.batch.layer_calls[5] < out.batch.layer_calls[0]


def test_pending_states_stay_within_their_bound(llama):
    loop = make_loop(llama, decide=lambda *_: True, max_pending=3, max_new_tokens=30)
    list(loop.run(prompts(4, 5, 6)))
    # Three drafts and the newest token of each of three sequences.
    assert loop.batch.peak_pending == 3 * 4


def test_the_cache_rows_of_finished_sequences_are_freed(llama):
    loop = make_loop(llama, Fidelity.DENSE, thresholds=(), exits=())
    rows = []
    for step, _ in enumerate(loop.run(prompts(4, 5, 6))):
        if step == 2:
            loop.stop_at(2, 1)
        rows.append(loop.cache.batch)
    assert rows[:3] == [3, 3, 3] and set(rows[3:]) == {2}
    assert [sequence.row for sequence in loop.sequences if sequence.index != 1] == [0, 1]
