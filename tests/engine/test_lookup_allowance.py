"""What looked-up drafts may lose: a small part of the time, whatever the text."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.engine.ngram_drafts import NgramDrafts

PERIOD = [7, 3, 11, 5, 9]


@settings(max_examples=60, deadline=None)
@given(
    cost=st.floats(0.0, 0.5),
    alphabet=st.integers(1, 4),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
)
def test_whatever_the_text_lookup_costs_at_most_three_hundredths_of_the_first_64_tokens(
    cost, alphabet, seed, share
):
    """By counts: a pass takes 1, and each draft in it `cost`, as the estimates know."""
    dice = random.Random(seed)
    drafts, text = NgramDrafts(6), [dice.randrange(alphabet) for _ in range(40)]
    drafts.note_single(1.0)
    drafts.learn(1, 0, 1.0 + cost)
    for _ in range(40):
        drafts._slope += 0.25 * (cost - drafts._slope)  # settled, whatever it began at
    time, tokens = 0.0, 0
    while tokens < 64:
        made = drafts.propose(text, 6)
        accepted = next((i for i in range(len(made)) if dice.random() >= share), len(made))
        seconds = 1.0 + cost * len(made)
        if made:
            drafts.note_drafts(len(made), accepted, seconds)
        else:
            drafts.note_single(seconds)
        text += [*made[:accepted], dice.randrange(alphabet)]
        time, tokens = time + seconds, tokens + accepted + 1
    assert time <= tokens / 0.97


def test_text_without_repetition_is_soon_left_alone_and_text_that_repeats_is_not():
    for share, least, most in ((0.0, 0, 20), (1.0, 200, 10**6)):
        drafts, text, proposed = NgramDrafts(6), PERIOD * 3, 0
        drafts.note_single(1.0)
        for _ in range(60):
            made = drafts.propose(text, 6)
            proposed += len(made)
            accepted = len(made) if share else 0
            text += [*made[:accepted], PERIOD[len(text) % len(PERIOD)]]
            if made:
                drafts.note_drafts(len(made), accepted, 1.0 + 0.1 * len(made))
            else:
                drafts.note_single(1.0)
        assert least <= proposed <= most
