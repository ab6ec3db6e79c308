"""Descriptions of structured output, and the grammar's constraint by itself."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.api import checkpoint
from deliberate.api.structured import Structure, StructuredOutput
from deliberate.utils.errors import DeliberateError

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("tiny")


def constraint(tokenizer, given, ends=None, vocabulary=1024):
    ends = [tokenizer.eos_token_id] if ends is None else ends
    return StructuredOutput.of(given).constraint(tokenizer, ends, vocabulary)


def walk(one, choose, most=80):
    """Text of an output whose free tokens `choose` takes among those allowed; forced ones taken."""
    made = []
    while not one.finished and len(made) < most:
        following = one.forced()
        if not following:
            scores = one.mask(torch.zeros(1024))
            following = [choose(torch.nonzero(scores == 0).flatten().tolist())]
        for token in following:
            one.advance(token)
            made.append(token)
    return made


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_walk_over_allowed_tokens_satisfies_the_schema(tokenizer, random):
    one = constraint(tokenizer, {"json_schema": SCHEMA})
    made = walk(one, random.choice)
    assert one.finished and one.tokens == made and made[-1] == tokenizer.eos_token_id
    found = json.loads(tokenizer.decode(made, skip_special_tokens=True))
    assert list(found) == ["name", "age", "kind"]
    assert len(found["name"]) <= 6 and found["age"] in range(151)
    assert found["kind"] in ("red", "green")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rolled_back_and_advanced_again_it_is_in_the_state_of_a_fresh_one(tokenizer, data):
    random = data.draw(st.randoms(use_true_random=False))
    one = constraint(tokenizer, {"json_schema": SCHEMA})
    made = walk(one.copy(), random.choice)
    for token in made:
        one.advance(token)
    for _ in range(3):
        keep = data.draw(st.integers(0, len(one.tokens)))
        one.rollback(len(one.tokens) - keep)
        fresh = constraint(tokenizer, {"json_schema": SCHEMA})
        for token in made[:keep]:
            fresh.advance(token)
        assert (one.tokens, one.forced()) == (fresh.tokens, fresh.forced())
        assert (one.finished, one.satisfied) == (fresh.finished, fresh.satisfied)
        zeros = torch.zeros(1024)
        assert torch.equal(one.mask(zeros), fresh.mask(zeros))
        if data.draw(st.booleans()):  # another way from here
            made = made[:keep] + walk(fresh, random.choice)
        again = made[keep : keep + data.draw(st.integers(0, len(made)))]
        for token in again:
            one.advance(token)
            one.mask(zeros)


def test_a_mask_that_was_computed_for_a_draft_serves_its_verification(tokenizer, monkeypatch):
    one = constraint(tokenizer, {"regex": "[ab]{8}"})
    computed = []
    inner = one._compute
    monkeypatch.setattr(one, "_compute", lambda: computed.append(len(one.tokens)) or inner())
    zeros, token = torch.zeros(1024), tokenizer.encode("a", add_special_tokens=False)[-1]
    other = tokenizer.encode("b", add_special_tokens=False)[-1]
    for _ in range(4):
        one.mask(zeros)
        one.advance(token)
    one.rollback(4)
    for _ in range(2):
        one.mask(zeros)
        one.advance(token)
    assert computed == [0, 1, 2, 3]
    one.advance(other)
    one.mask(zeros)
    assert computed == [0, 1, 2, 3, 3]


def test_forced_tokens_are_allowed_one_by_one(tokenizer):
    one = constraint(tokenizer, {"json_schema": SCHEMA})
    following = one.forced()
    assert tokenizer.decode(following).replace(" ", "") == '{"name":"'
    for token in following:
        assert one.mask(torch.zeros(1024))[token] == 0
        one.advance(token)
    assert one.forced() == []


def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(tokenizer):
    one = constraint(tokenizer, {"choice": ["yes", "no"]})
    before = one.mask(torch.zeros(1024))
    with pytest.raises(DeliberateError, match="does not allow token 2 at generated token 0"):
        one.advance(tokenizer.eos_token_id)
    with pytest.raises(DeliberateError, match="does not allow token"):
        one.advance(tokenizer.encode("q", add_special_tokens=False)[-1])
    assert torch.equal(one.mask(torch.zeros(1024)), before)


def test_nothing_follows_the_end_token(tokenizer):
    one = constraint(tokenizer, {"choice": ["no"]}, ends=[2, 7])
    walk(one, lambda allowed: allowed[0])
    assert one.finished and one.forced() == []
    assert one.mask(torch.zeros(1024)).max() == -torch.inf
    with pytest.raises(DeliberateError, match="does not allow"):
        one.advance(2)
    one.rollback(1)
    assert one.satisfied and not one.finished and one.forced() == [2]


def test_every_end_token_of_the_generation_may_end_the_output_and_no_other(tokenizer):
    one = constraint(tokenizer, {"regex": "a+"}, ends=[5, 7])
    for token in tokenizer.encode("a", add_special_tokens=False)[-1:]:
        one.advance(token)
    allowed = torch.nonzero(one.mask(torch.zeros(1024)) == 0).flatten().tolist()
    assert {5, 7} < set(allowed) and tokenizer.eos_token_id not in allowed


def test_logits_wider_than_the_tokenizer_hold_no_allowed_token_there(tokenizer):
    one = constraint(tokenizer, {"regex": "(?s:.)*"}, vocabulary=1100)
    assert one.mask(torch.zeros(1100))[1024:].max() == -torch.inf


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"choice": ["yes", 'say "é"\n', "\\d"]}, {"yes", 'say "é"\n', "\\d"}),
        ({"regex": "[ab]-[cd]"}, {"a-c", "a-d", "b-c", "b-d"}),
        ({"grammar": 'root ::= "x" ("1" | "2")'}, {"x1", "x2"}),
        ({"grammar": 'start: "x" ("1" | "2")'}, {"x1", "x2"}),
        ({"json_schema": '{"enum": [1, 2]}'}, {"1", "2"}),
    ],
)
def test_outputs_are_exactly_those_of_the_description(tokenizer, given, texts):
    found, ways = set(), [[]]
    while ways:
        way = ways.pop()
        one = constraint(tokenizer, given)
        for token in way:
            one.advance(token)
        if one.finished:
            found.add(tokenizer.decode(way, skip_special_tokens=True))
            continue
        allowed = torch.nonzero(one.mask(torch.zeros(1024)) == 0).flatten().tolist()
        ways += [[*way, token] for token in allowed]
    assert {text.strip(" ") for text in found} == texts


def test_a_pydantic_model_is_a_schema():
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(str, ...))
    given = StructuredOutput.of({"json_schema": person})
    assert given.structure is Structure.JSON_SCHEMA and '"name"' in given.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "give a dict with one of json_schema, regex, choice, grammar"),
        ({"regex": "a", "choice": ["b"]}, "give a dict with one of"),
        ({"xml": "a"}, "'xml' is not one of json_schema"),
        ({"regex": ""}, "structured regex='': it must be a text"),
        ({"choice": "yes"}, "choice='yes': give a list of texts"),
        ({"choice": []}, "give a list of texts"),
        ({"json_schema": "{"}, "structured json_schema: "),
        ({"json_schema": 3}, "give a dict, JSON text or a pydantic model"),
    ],
)
def test_a_description_that_is_none_is_refused_by_name(given, message):
    with pytest.raises(DeliberateError, match=message):
        StructuredOutput.of(given)


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "("},
        {"grammar": "root ::= nothing"},
        {"grammar": "no grammar"},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"type": "object", "unevaluatedItems": {"type": "string"}}},
    ],
)
def test_an_error_in_a_description_is_one_line(tokenizer, given):
    (kind,) = given
    with pytest.raises(DeliberateError, match=f"structured {kind}: ") as error:
        constraint(tokenizer, given)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(tokenizer, monkeypatch):
    with pytest.raises(DeliberateError, match="needs the tokenizer: pass tokenizer="):
        constraint(None, {"regex": "a"}, ends=[2])
    with pytest.raises(DeliberateError, match="needs a token that ends it: set eos_token_id"):
        constraint(tokenizer, {"regex": "a"}, ends=[])
    with pytest.raises(DeliberateError, match="tokenizer has 1024 tokens and the model's logits 9"):
        constraint(tokenizer, {"regex": "a"}, vocabulary=9)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DeliberateError, match=r"llguidance`: pip install 'deliberate-depth\[struc"):
        constraint(tokenizer, {"regex": "a"})
