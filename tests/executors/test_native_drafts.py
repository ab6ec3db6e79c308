"""Drafts of several sequences in one call: each row as by itself, until a deep pass is due."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.kernels import native_build
from deliberate.kernels.native_drafts import DraftRow

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
LENGTHS, STEPS = (6, 3, 9), 8
FREE = {"enough": 99, "patience": 99, "waiting": False}


@pytest.fixture(scope="module")
def steps():
    """A model of four layers with an exit below the second."""
    base = tiny_model("llama", dtype=torch.float32)
    model = AdaptiveModel(base, [2], executor="fused", engine="native")
    return model.backbone, model.backbone.multi_step(model.reader())


def filled(backbone, cache, rows):
    """Prompts of `LENGTHS` tokens in these rows of the cache, through the layers below the exit."""
    for row, length in zip(rows, LENGTHS, strict=True):
        ids = random_ids(length, seed=length)
        ctx = backbone.pass_context([row], [0], [length], batch=cache.batch)
        backbone.run_layers(backbone.embed(ids, ctx), 0, 2, ctx, cache)
    return cache


def row_of(row: int, length: int, threshold: float = 0.0, stops=(), **changes) -> DraftRow:
    fields = {"steps": STEPS, "requested": STEPS - 1} | changes
    return DraftRow(row, 5, length, threshold=threshold, stops=stops, **fields)


@torch.inference_mode()
def test_every_row_gets_what_it_gets_by_itself(steps):
    backbone, multi_step = steps
    alone = []
    for length in LENGTHS:
        cache = filled(backbone, backbone.new_cache(0, 3), range(3))
        how = {"steps": STEPS, "requested": STEPS - 1, "threshold": 0.0, "stops": ()}
        row = LENGTHS.index(length)
        alone.append(multi_step.decode(0, 2, 5, length, cache, row=row, accept_stops=False, **how))
    for blocks in (False, True):
        if blocks:
            cache = backbone.new_block_cache(60, block_size=4, max_rows=3)
            rows = [cache.open_row(40) for _ in LENGTHS]
        else:
            cache, rows = backbone.new_cache(0, 3), range(3)
        filled(backbone, cache, rows)
        wanted = [row_of(*one) for one in zip(rows, LENGTHS, strict=True)]
        made = multi_step.draft_rows(0, 2, wanted, cache, **FREE)
        for own, expected, row, length in zip(made.rows, alone, rows, LENGTHS, strict=True):
            assert (own.tokens, own.scores) == (expected.tokens, expected.scores)
            assert own.accepted == expected.accepted == STEPS - 1
            assert torch.equal(own.states, expected.states)
            assert cache.length(1, row) == length + STEPS
        assert len(made.seconds) == STEPS


@torch.inference_mode()
def test_a_row_ends_at_its_threshold_its_stop_or_its_limit(steps):
    backbone, multi_step = steps
    cache = filled(backbone, backbone.new_cache(0, 3), range(3))
    free = multi_step.draft_rows(0, 2, [row_of(0, 6), row_of(1, 3)], cache, **FREE)
    second, third = free.rows[0].tokens[1], free.rows[1].scores[2]
    first_seen = free.rows[0].tokens.index(second)
    above = max(score for score in free.rows[1].scores[:2]) if third < 0 else third
    cache = filled(backbone, backbone.new_cache(0, 3), range(3))
    rows = [
        row_of(0, 6, stops=(VOCAB + 1, second)),
        row_of(1, 3, threshold=above + 1e-6),
        row_of(2, 9, steps=2, requested=2),
    ]
    made = multi_step.draft_rows(0, 2, rows, cache, **FREE)
    stopped, rejected, limited = made.rows
    assert (len(stopped.states), stopped.accepted) == (first_seen + 1, first_seen)
    assert stopped.tokens == free.rows[0].tokens[: first_seen + 1]
    expected = next((i for i, s in enumerate(free.rows[1].scores) if s < above + 1e-6), STEPS - 1)
    assert rejected.accepted == expected
    assert (len(limited.states), limited.accepted) == (2, 2)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("how", "passes"),
    [
        ({"enough": 1}, 2),  # ends with the pass after which one needs a deep pass
        ({"enough": 2}, 4),
        ({"patience": 1}, 3),
        ({"patience": 3, "waiting": True}, 3),
        ({}, STEPS),
    ],
)
def test_a_call_ends_when_a_deep_pass_is_due(steps, how, passes):
    backbone, multi_step = steps
    cache = filled(backbone, backbone.new_cache(0, 3), range(3))
    rows = [
        row_of(0, 6, steps=2, requested=1),
        row_of(1, 3, steps=4, requested=3),
        row_of(2, 9),
    ]
    made = multi_step.draft_rows(0, 2, rows, cache, **(FREE | how))
    assert len(made.seconds) == passes
    assert [len(one.states) for one in made.rows] == [min(2, passes), min(4, passes), passes]
