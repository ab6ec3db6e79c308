"""Decoding with drafts by the C++ kernels: what is looked up, and calls that are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import DIM, VOCAB, WIDTH, buffers, layer, weight

from deliberate.engine.ngram_drafts import LONGEST, SHORTEST, NgramDrafts
from deliberate.kernels import native_build
from deliberate.kernels.border import BorderError
from deliberate.kernels.draft_rules import (
    CLASSES,
    ChainRule,
    LookupRule,
    affordable,
    confidence_class,
)
from deliberate.kernels.native import Layers
from deliberate.kernels.native_draft_layer import DraftLayerCall
from deliberate.kernels.native_drafted import DraftedDecoding, LayerPart, ModelPart
from deliberate.kernels.native_heads import Head
from deliberate.kernels.native_inputs import KeysValues

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)
ROOM, POSITIONS = 64, 140
ALL = tuple(range(1, ROOM))


def lookup(best=ALL, **changes) -> LookupRule:
    how = {"shortest": SHORTEST, "longest": LONGEST, "every": 16} | changes
    return LookupRule(tuple(best), **how)


def rule(limit=3, **changes) -> ChainRule:
    costs = {"token_value": 0.0, "token_cost": -1.0, "draft_value": 0.0, "draft_cost": -1.0}
    return ChainRule((0.5,) * CLASSES, **(costs | changes), limit=limit)


def rotary(positions=POSITIONS):
    return torch.randn(positions, DIM), torch.randn(positions, DIM)


def a_call(text=(3, 5, 2), **changes) -> dict:
    made = {
        "kv": KeysValues(buffers(1, POSITIONS)),
        "embedding": torch.randn(VOCAB, WIDTH),
        "text": list(text),
        "rotary": rotary(),
        "head": Head(torch.randn(WIDTH), 1e-6, weight(VOCAB, WIDTH)),
        **{"room": ROOM, "threads": 1, "passes": 1, "left": 99, "stops": ()},
        **{"layer": None, "lookup": lookup()},
    }
    return made | changes


def a_part(states=2, limit=3, **changes) -> LayerPart:
    call = DraftLayerCall(
        Layers([layer(window=0, query_norm=None, key_norm=None)]),
        weight(VOCAB, WIDTH),
        weight(WIDTH, 2 * WIDTH),
        (torch.randn(WIDTH), 1e-6),
        (torch.randn(WIDTH), 1e-6),
    )
    made = {
        "call": call,
        "kv": KeysValues(buffers(1, POSITIONS, layers=1)),
        "head": Head(None, 1e-6, weight(VOCAB, WIDTH)),
        "rotary": rotary(),
        **{"row": 0, "entries": 0, "states": torch.randn(states, WIDTH), "rule": rule(limit)},
    }
    return LayerPart(**(made | changes))


def a_model(limit=3, ranges=((0, 2),), layers=2, vocabulary=VOCAB, width=WIDTH) -> ModelPart:
    made = Layers([layer() for _ in range(layers)])
    head = Head(torch.randn(width), 1e-6, weight(vocabulary, width))
    return ModelPart(made, ranges, head, rule(limit))


def decode(call: dict):
    torch.manual_seed(0)
    return DraftedDecoding(Layers([layer(), layer()])).decode(**call)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=60))
def test_what_followed_the_longest_match_last_time_is_found_as_by_the_decode_loop(text):
    drafts = NgramDrafts(ROOM - 1)
    found = drafts._match(text)
    (made,) = decode(a_call(text)).passes
    # What is found reaches to the end of the text, so its length says where it begins.
    assert made.drafted == made.looked_up == len(found)


@pytest.mark.parametrize(("declined", "drafts"), [(0, 0), (14, 0), (15, 1)])
def test_matches_that_do_not_pay_are_tried_now_and_then(declined, drafts):
    call = a_call([1, 2, 3, 1, 2], lookup=lookup((0,) * 5, declined=declined))
    made = decode(call)
    assert made.passes[0].drafted == drafts and made.declined == declined + 1


@pytest.mark.parametrize(("allowance", "drafts"), [(0.0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (9, 4)])
def test_no_more_is_drafted_than_the_allowance_is_enough_for(allowance, drafts):
    how = {"cost": 0.2, "earned": 0.01, "most_allowance": 3.0}
    call = a_call([1, 2, 3, 4, 1, 2], lookup=lookup(allowance=allowance, **how))
    made = decode(call)
    (one,) = made.passes
    assert one.drafted == drafts == affordable(allowance, 0.2, 4)
    left = allowance + 0.01 * (one.accepted + 1) + one.accepted - 0.2 * drafts
    assert made.allowance == pytest.approx(min(3.0, left))


def test_passes_end_with_the_room_the_tokens_that_are_left_and_their_number():
    text = [1, 2, 3, 1, 2]
    for changes, passes, tokens in (
        ({"left": 1}, 1, 1),
        ({"passes": 5, "left": 3, "lookup": lookup((0, 0))}, 3, 3),
        ({"passes": 4, "lookup": lookup((0, 0))}, 4, 4),
        ({"passes": 50, "room": 6, "lookup": lookup((0, 0))}, 4, 4),
    ):
        made = decode(a_call(text, **changes))
        assert (len(made.passes), len(made.tokens)) == (passes, tokens)
        assert made.states.shape == (tokens, WIDTH)
    stop = made.tokens[1]
    ended = decode(a_call(text, passes=9, lookup=lookup((0, 0)), stops=(stop,)))
    assert ended.tokens[-1] == stop or stop not in ended.tokens


def test_a_cache_needs_no_room_behind_the_last_token():
    text, heavy = [1, 2, 3, 1, 2], {"passes": 9, "lookup": lookup((0, 0))}
    short = KeysValues(buffers(1, len(text) - 1 + 3))
    assert len(decode(a_call(text, kv=short, left=3, **heavy)).tokens) == 3
    with pytest.raises(BorderError, match="rows of 7 slots"):
        decode(a_call(text, kv=short, left=4, **heavy))


def test_a_chain_goes_as_far_as_its_rule():
    text = [1, 2, 3]
    for changes, most in (
        ({}, 3),
        ({"draft_value": 1.0, "draft_cost": 0.3}, 2),  # S is 0.5, then 0.25
        ({"draft_value": 1.0, "draft_cost": 0.6}, 1),
        ({"token_value": 1.0, "token_cost": 0.3}, 1),  # the second is made and not kept
    ):
        part = a_part(rule=rule(**changes))
        made = decode(a_call(text, layer=part, lookup=None)).passes[0]
        assert made.drafted == len(made.confidences) == most
        assert made.looked_up == 0 and made.drafting > 0 and made.verifying > 0


@pytest.mark.parametrize("ranges", [((0, 2),), ((0, 1),), ((1, 2),), ((0, 1), (1, 2))])
def test_drafts_by_layers_over_the_same_cache_leave_what_full_depth_wrote(ranges):
    text, made, held = [1, 2, 3], [], []
    for drafts in ({"lookup": lookup((0, 0))}, {"model": a_model(ranges=ranges), "lookup": None}):
        torch.manual_seed(1)
        call = a_call(text, passes=9, left=9, **drafts)
        made.append(decode(call))
        end = len(text) - 1 + 9
        held.append([pair[..., :end, :].clone() for own in call["kv"]._keep for pair in own])
    plain, drafted = made
    assert drafted.tokens == plain.tokens and torch.equal(drafted.states, plain.states)
    assert sum(one.drafted for one in drafted.passes) > 0
    assert all(torch.equal(*pair) for pair in zip(*held, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer": None, "lookup": None}, "no layer, no model and no lookup"),
        ({"room": 3}, "the positions that there is room for is 3"),
        ({"room": POSITIONS}, "the first position"),
        ({"passes": 0}, "the number of passes is 0"),
        ({"left": 0}, "the number of tokens that are decoded is 0"),
        ({"text": [1, VOCAB]}, "the token that is fed"),
        ({"kv": KeysValues(buffers(1, 30))}, "the cache has 1 rows of 30 slots"),
        ({"row": 1}, "row 1"),
        ({"layer": a_part(states=3)}, "the number of states without entries is 3"),
        ({"layer": a_part(limit=70)}, "the positions that there is room for"),
        ({"layer": a_part(rotary=rotary(40))}, "the number of positions is 66"),
        ({"layer": a_part(kv=KeysValues(buffers(1, 40, layers=1)))}, "rows of 40 slots"),
        ({"layer": a_part(row=1)}, "row 1"),
        ({"text": [3, 5, 2], "layer": a_part(states=2, entries=-1)}, "the first position is -1"),
        ({"text": [3, VOCAB, 2], "layer": a_part()}, "the largest token"),
        ({"layer": a_part(head=Head(None, 1e-6, weight(VOCAB + 1, WIDTH)))}, "are drafted is 18"),
        ({"layer": a_part(), "model": a_model()}, "a layer and a model: give one of the two"),
        ({"model": a_model(limit=70)}, "the positions that there is room for"),
        ({"model": a_model(layers=3)}, "the number of layers that draft is 3"),
        ({"model": a_model(vocabulary=VOCAB + 1)}, "the head may choose is 18"),
        ({"model": a_model(width=8)}, "the width of states that a head reads"),
    ],
)
def test_calls_that_the_kernels_cannot_run_are_refused(changes, said):
    with pytest.raises(BorderError, match=said):
        decode(a_call(**changes))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ChainRule((0.5,), 0, 0, 0, 0, 1), "classes of confidence is 1"),
        (lambda: rule(limit=0), "the number of drafts is 0"),
        (lambda: lookup(()), "the number of drafts is 0"),
        (lambda: lookup((1, 3)), "the number of drafts of 2 tokens is 3"),
        (lambda: lookup(longest=1), "must have been there"),
        (lambda: lookup(every=0), "times without a draft is 0"),
        (lambda: lookup(cost=-0.1), "a draft costs -0.1"),
        (lambda: a_model(ranges=()), "the number of runs of layers is 0"),
        (lambda: a_model(ranges=((0, 3),)), "the last layer of a run is 3"),
        (lambda: a_model(ranges=((1, 1),)), "the last layer of a run is 1"),
        (lambda: a_model(ranges=((1, 2), (0, 1))), "the first layer of a run is 0"),
    ],
)
def test_rules_that_cannot_be_are_refused(make, said):
    with pytest.raises(BorderError, match=said):
        make()


def test_confidences_fall_into_tenths():
    found = [confidence_class(one) for one in (-1.0, 0.0, 0.099, 0.1, 0.95, 1.0, float("nan"))]
    assert found == [0, 0, 0, 1, 9, 9, 0]
