"""Tokens become whole characters; a stop string never reaches the client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deliberate.serving.text import AnswerText


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is special."""

    def decode(self, tokens, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


def pieces(tokens, stops=()):
    text = AnswerText(Bytes(), stops)
    made = [text.push(token) for token in tokens]
    return [*made, text.finish()], text


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text_and_each_holds_whole_characters(whole):
    made, text = pieces(whole.encode())
    assert "".join(made) == whole and not text.stopped
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in made) or "\ufffd" in whole


@given(
    st.text("ab€", max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_ends_before_the_stop_string_that_is_complete_first(whole, stops):
    made, text = pieces(whole.encode(), stops)
    ends = [place + len(stop) for stop in stops if (place := whole.find(stop)) >= 0]
    seen = whole[: min(ends)] if ends else whole  # the stop string that is complete first counts
    starts = [place for stop in stops if (place := seen.find(stop)) >= 0]
    assert "".join(made) == (seen[: min(starts)] if ends else whole)
    assert text.stopped == bool(ends)


def test_what_may_become_a_stop_string_is_held_back_until_it_is_decided():
    text = AnswerText(Bytes(), ["END"])
    assert [text.push(b) for b in b"xENx"] == ["x", "", "", "ENx"]
    assert [text.push(b) for b in b"yE"] == ["y", ""]
    assert text.finish() == "E"


def test_tokens_after_a_stop_string_are_not_counted():
    _, text = pieces(b"ab.cd", ["."])
    assert text.token_count == 3


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_lose_nothing_but_themselves(data):
    made, _ = pieces([*data, 256])
    assert "".join(made) == data.decode("utf-8", errors="replace")
