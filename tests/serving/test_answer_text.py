"""Tokens become whole characters; a stop string never reaches the client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deliberate.api import checkpoint
from deliberate.serving.text import AnswerText, decoder


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


def test_a_fast_tokenizer_is_read_as_transformers_reads_it_without_its_checks(monkeypatch) -> None:
    tokenizer = checkpoint.load_tokenizer("tiny")
    own = decoder(tokenizer)
    rows = [list(range(at, at + 7)) for at in range(0, len(tokenizer) - 7, 61)]
    for ids in [[], *rows, list(tokenizer.all_special_ids)]:
        assert own(ids) == tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    monkeypatch.setattr(type(tokenizer), "decode", None)
    assert own(rows[0])  # it does not go through `decode`


def test_a_tokenizer_with_a_decoding_of_its_own_is_asked_for_it() -> None:
    plain = type(checkpoint.load_tokenizer("tiny"))

    class Own(plain):
        def _decode(self, token_ids, **given):
            return "own"

    tokenizer = checkpoint.load_tokenizer("tiny")
    tokenizer.__class__ = Own
    assert decoder(tokenizer)([5]) == "own"
