"""The text of an output with tags: reasoning and answer apart, whatever the tokens are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.reasoning.marks import ReasoningMarks
from deliberate.serving.reasoning_text import ReasoningText

# Tokens 0 to 9 are these texts; both tags have three tokens and begin alike.
TEXTS = ["<", "t", ">", "/", "a", "b", " ", "\n", "é", "."]
OPENING, CLOSING = (0, 1, 2), (0, 3, 2)


class Tokenizer:
    def decode(self, tokens, **_):
        return "".join(TEXTS[token] for token in tokens)


def read(tokens, *, begun=False, stops=(), apart=True):
    marks = ReasoningMarks(CLOSING, () if begun else OPENING, reopening=OPENING)
    text = ReasoningText(Tokenizer(), marks, stops, apart=apart)
    parts = {True: "", False: ""}
    for token in tokens:
        said = text.push(token)
        parts[text.is_reasoning] += said
    rest = text.finish()
    parts[text.is_reasoning] += rest
    return parts[True], parts[False], text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.booleans())
def test_it_is_the_text_cut_at_the_tags(tokens, begun):
    reasoning, answer, text = read(tokens, begun=begun)
    whole = "".join(TEXTS[token] for token in tokens)
    before, opened, rest = ("", "<t>", whole) if begun else whole.partition("<t>")
    inside, closed, after = rest.partition("</>")
    if not opened:
        assert (reasoning, answer, text.reasoning_tokens) == ("", before, 0)
    else:
        assert reasoning == inside and text.reasoning_tokens == len(inside)
        assert answer == before + (after.lstrip() if closed else "")
    assert text.token_count == len(tokens)


CALL = (0, 4, 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=24))
def test_a_call_ends_the_reasoning_and_is_the_answers_from_its_first_token_on(tokens):
    text = ReasoningText(Tokenizer(), ReasoningMarks(CLOSING, call=CALL), apart=True)
    parts = {True: "", False: ""}
    for token in tokens:
        said = text.push(token)
        parts[text.is_reasoning] += said
    rest = text.finish()
    parts[text.is_reasoning] += rest
    whole = "".join(TEXTS[token] for token in tokens)
    call, close = whole.find("<a>"), whole.find("</>")
    if call >= 0 and (close < 0 or call < close):
        assert parts == {True: whole[:call], False: whole[call:]}
        assert text.reasoning_tokens == call
    else:
        inside, _, after = whole.partition("</>")
        assert parts == {True: inside, False: after.lstrip()}


@pytest.mark.parametrize(("tokens", "said"), [([4, 0, 3], "a"), ([4, 0, 3, 5], "a</b")])
def test_what_may_become_a_tag_is_held_back(tokens, said):
    text = ReasoningText(Tokenizer(), ReasoningMarks(CLOSING, reopening=OPENING), apart=True)
    assert "".join(text.push(token) for token in tokens) == said


def test_stop_strings_are_of_the_answer():
    tokens = [4, 5, *CLOSING, 7, 5, 4, 5]
    reasoning, answer, text = read(tokens, begun=True, stops=("a",))
    assert (reasoning, answer) == ("ab", "b") and text.stopped


def test_a_text_that_is_not_apart_has_its_tags_and_a_count():
    tokens = [*OPENING, 4, 5, *CLOSING, 4]
    reasoning, answer, text = read(tokens, apart=False)
    assert (reasoning, answer, text.reasoning_tokens) == ("", "<t>ab</>a", 2)
