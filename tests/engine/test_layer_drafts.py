"""Drafts of a draft layer: which entries it holds, how many drafts pay, when a lookup is taken."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.engine.draft_lengths import BINS, DraftLengths, DraftPrior
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.engine.ngram_drafts import NgramDrafts
from deliberate.utils.errors import DeliberateError


class Entries:
    """A cache that remembers what was written."""

    def __init__(self):
        self.written = []

    @property
    def length(self):
        return len(self.written)

    def crop(self, length):
        del self.written[length:]

    def close(self):
        self.crop(0)


class Runner:
    """Writes (state, token) and drafts from a list of tokens; its own states are negative."""

    def __init__(self, tokens=None, confidence=0.95):
        self.tokens = tokens or itertools.cycle([1])
        self.confidence, self.cache = confidence, None

    def new_cache(self):
        self.cache = Entries()
        return self.cache

    def extend_rows(self, caches, states, tokens):
        given = iter(states[:, 0].tolist())
        for cache, own in zip(caches, tokens, strict=True):
            cache.written += [(next(given), token) for token in own]
        return -torch.ones(len(states), 1)

    def read_rows(self, outputs):
        return [(next(self.tokens), self.confidence) for _ in outputs]


class Steps:
    """A clock that advances by one each time it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


def states(first, count):
    """States that say which position they are of."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None]


def drafts_of(runner, **how):
    return LayerDrafts(runner, DraftLengths(DraftPrior(), 8), clock=Steps(), **how)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 6),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=12),
)
def test_the_layer_holds_one_entry_for_every_verified_token_and_none_of_a_draft(prompt, steps):
    runner = Runner()
    drafts = drafts_of(runner, fixed=4)
    ids = list(range(100, 100 + prompt + 1))  # the prompt and the first token
    drafts.saw(0, states(0, prompt))
    for most, accepted, asked in steps:
        made = drafts.propose(ids, most) if asked and most else []
        if made:
            known = [(float(at), ids[at + 1]) for at in range(len(ids) - 1)]
            assert runner.cache.written == known
        drafts.saw(len(ids) - 1, states(len(ids) - 1, 1 + len(made)))
        kept = min(accepted, len(made))
        ids += [*made[:kept], 7]


def test_entries_begin_where_the_first_state_was_seen_or_after_a_gap():
    runner = Runner()
    drafts = drafts_of(runner, fixed=1)
    drafts.saw(3, states(3, 2))  # positions 0..2 were cached, and their states are not known
    assert drafts.propose([9, 9, 9, 9, 14, 15], 4) == [1]
    assert runner.cache.written == [(3.0, 14), (4.0, 15)]
    drafts.saw(9, states(9, 1))
    assert drafts.propose([9] * 10 + [20], 4) == [1]
    assert runner.cache.written == [(9.0, 20)]


def test_without_new_states_nothing_is_drafted():
    drafts = drafts_of(Runner(), fixed=2)
    assert drafts.propose([1, 2, 3], 4) == []
    drafts.saw(0, states(0, 2))
    assert drafts.propose([1, 2, 3], 4) == [1, 1]
    assert drafts.propose([1, 2, 3], 4) == []


def test_drafting_goes_on_while_it_pays_and_stops_at_the_limits():
    prior = DraftPrior(acceptance=(0.0,) * 9 + (1.0,), draft_cost=0.05, token_cost=0.05)
    lengths = DraftLengths(prior, 5)
    for tokens, confidence, made in (([4], 0.99, 5), ([4], 0.05, 1)):
        drafts = LayerDrafts(Runner(itertools.cycle(tokens), confidence), lengths, clock=Steps())
        lengths.note_single(1.0)
        drafts.saw(0, states(0, 2))
        assert len(drafts.propose([1, 2, 3], 9)) == made
        drafts.saw(2, states(2, 1))
        assert len(drafts.propose([1, 2, 3, 4], 2)) == min(2, made)


def test_a_layer_whose_drafts_are_rejected_is_soon_declined_and_tried_again_later():
    lengths = DraftLengths(DraftPrior(draft_cost=0.2, token_cost=0.2), 4)
    drafts = LayerDrafts(Runner(confidence=0.95), lengths, clock=Steps())
    lengths.note_single(1.0)
    ids, counts = [1, 2], []
    drafts.saw(0, states(0, 1))
    for _ in range(1500):
        made = drafts.propose(ids, 4)
        counts.append(len(made))
        drafts.saw(len(ids) - 1, states(len(ids) - 1, 1 + len(made)))
        if made:
            drafts.note_drafts(len(made), 0, 1.0 + 0.2 * len(made))
        else:
            drafts.note_single(1.0)
        ids.append(3)
    assert counts[0] >= 1
    late = counts[-200:]
    assert sum(map(bool, late)) <= 200 / 8
    assert any(late)


def test_what_is_looked_up_is_taken_where_the_layers_first_draft_agrees():
    text = [5, 6, 7, 8, 9, 5, 6, 7]  # 8 9 5 .. followed 5 6 7
    for first, wanted in ((8, [8, 9, 5]), (3, [3, 3])):
        lookup = NgramDrafts(3)
        for _ in range(8):
            lookup.note_drafts(3, 3, 0.0)
        lengths = DraftLengths(DraftPrior(draft_cost=0.01, token_cost=0.01), 2)
        lengths.note_single(1.0)
        runner = Runner(itertools.cycle([first]))
        drafts = LayerDrafts(runner, lengths, lookup=lookup, clock=Steps())
        drafts.saw(0, states(0, 7))
        assert drafts.propose(text, 9) == wanted
        assert runner.cache.length == 7


def test_a_prior_follows_what_was_observed():
    confidences = [0.95] * 90 + [0.15] * 10
    accepted = [True] * 81 + [False] * 9 + [False] * 10
    prior = DraftPrior.from_observed(
        confidences, accepted, survives=(0.8, 0.5), draft_cost=0.1, token_cost=0.05
    )
    lengths = DraftLengths(prior, 4)
    assert lengths.accepts(0.99) == pytest.approx(0.9, abs=0.03)
    assert lengths.accepts(0.12) == pytest.approx(0.05, abs=0.05)
    assert lengths.mean_acceptance == pytest.approx(0.81, abs=0.03)
    assert DraftPrior.from_dict(prior.to_dict()) == prior


def test_a_prior_that_cannot_be_is_one_line():
    with pytest.raises(DeliberateError, match=f"3 acceptance: give {BINS}"):
        DraftPrior(acceptance=(0.1, 0.2, 0.3))
    with pytest.raises(DeliberateError, match="draft_cost 0"):
        DraftPrior(draft_cost=0.0)
    with pytest.raises(DeliberateError, match="draft_tokens 0"):
        DraftLengths(DraftPrior(), 0)
