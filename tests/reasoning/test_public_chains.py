"""Outputs of other systems become chains, with the answers that their texts state along the way."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deliberate.api import checkpoint
from deliberate.eval.grading.answers import extract_answer, stated_answer
from deliberate.reasoning.public_chains import (
    TAGS,
    OutputFields,
    read_outputs,
    recorded_output,
    split_output,
    stated_probes,
)
from deliberate.reasoning.recorded_chains import ProbePlaces
from deliberate.utils.errors import DeliberateError

TEXT = "First 3 + 4 = 7.\nSo the answer is 7.\nWait, 3 + 5 = 8.\nThe answer is 8.\nYes."


def number_of(text):
    return extract_answer(text, "auto") or ""


def written(tmp_path, *records):
    path = tmp_path / "outputs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


@pytest.mark.parametrize("tags", TAGS)
def test_the_reasoning_is_what_stands_between_the_tags(tags):
    opening, closing = tags
    assert split_output(f"{opening}a b{closing}c") == ("a b", "c")
    assert split_output(f"a b{closing}c") == ("a b", "c")  # the template wrote the opening tag
    assert split_output(f"{opening}a b") == ("a b", None)  # cut off
    assert split_output("a b") == ("a b", None)


@given(st.text(alphabet="ab<think>/ |", max_size=40), st.text(alphabet="ab", max_size=10))
def test_no_text_is_lost_between_reasoning_and_answer(reasoning, after):
    if any(tag in reasoning for pair in TAGS for tag in pair):
        return
    for opening, closing in TAGS:
        assert split_output(f"{opening}{reasoning}{closing}{after}") == (reasoning, after)


def test_lines_are_read_by_their_fields_and_lists_of_one_are_texts(tmp_path):
    path = written(
        tmp_path,
        {"idx": 3, "code": ["<think>a</think>so 7"], "pred": ["7"], "gt": "7", "question": "q"},
        {"idx": 4, "code": ["<think>a b c"], "pred": ["1"], "gt": "2", "other": [1, 2]},
        {"code": "<think>a</think>the answer is 5", "gt": 5},
    )
    keys = OutputFields(id="idx", output="code", answer="pred", expected="gt")
    whole, cut_off, unread = read_outputs(path, keys, number_of)
    assert (whole.id, whole.question, whole.answer, whole.expected) == ("3", "q", "7", "7")
    assert (cut_off.after, cut_off.answer) == (None, "")  # what was read from it is no answer
    assert (unread.id, unread.answer, unread.expected) == ("2", "5", "5")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a"}, "no text in fields.output=output; the line has text"),
        ({"output": ["a", "b"]}, "no text in fields.output=output"),
        ([1], "not an object"),
    ],
)
def test_lines_without_an_output_are_refused(tmp_path, record, words):
    with pytest.raises(DeliberateError, match=words):
        read_outputs(written(tmp_path, record), OutputFields(), number_of)


def test_a_file_without_outputs_and_a_key_without_a_name_are_refused(tmp_path):
    with pytest.raises(DeliberateError, match="no outputs"):
        read_outputs(written(tmp_path), OutputFields(), number_of)
    with pytest.raises(DeliberateError, match=r"fields\.answer is empty"):
        OutputFields(answer="")


def test_a_probe_answers_what_the_text_has_stated_last():
    tokenizer = checkpoint.load_tokenizer("tiny")

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    tokens = encode(TEXT)
    places = ProbePlaces(chunk=3, boundaries=("\n",), switches=("Wait",))
    probes = stated_probes(tokens, places, encode, tokenizer.decode, stated_answer)
    assert [one.at for one in probes] == sorted({one.at for one in probes})
    assert set(range(3, len(tokens) + 1, 3)) <= {one.at for one in probes}
    for one in probes:
        before = tokenizer.decode(tokens[: one.at])
        assert one.answer == (stated_answer(before) or ""), before
        assert (one.tokens, one.confidence) == (0, 0.0)
    assert {"", "7", "8"} == {one.answer for one in probes}


def test_a_chain_that_was_cut_off_is_not_finished(tmp_path):
    records = [{"output": "<think>a b</think> 7"}, {"output": "<think>a b"}]
    outputs = read_outputs(written(tmp_path, *records), OutputFields(), number_of)
    chains = [recorded_output(one, lambda text: [1] * len(text)) for one in outputs]
    assert [(one.finished, len(one.tokens), one.answer_tokens) for one in chains] == [
        (True, 3, 2),
        (False, 3, 0),
    ]
