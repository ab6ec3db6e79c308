"""Reasoning and then an answer of a given form: each rule in its own part of the output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.reasoning.budget_state import Phase
from deliberate.reasoning.marks import ReasoningMarks, begun_in, reasoning_tags
from deliberate.reasoning.structured_answer import StructuredAnswer
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.utils.errors import DeliberateError

OPEN, OPEN_2, CLOSE, END, BLANK, A, B, C = range(8)
VOCABULARY = 12


class Word:
    """A form: the given tokens, and then an end."""

    def __init__(self, tokens) -> None:
        self._want, self._at = [*tokens, END], 0

    @property
    def finished(self) -> bool:
        return self._at == len(self._want)

    def mask(self, scores):
        made = torch.full_like(scores, float("-inf"))
        if not self.finished:
            made[self._want[self._at]] = scores[self._want[self._at]]
        return made

    def advance(self, token: int) -> None:
        if self.finished or token != self._want[self._at]:
            raise DeliberateError(f"token {token} is not of the form")
        self._at += 1

    def rollback(self, count: int) -> None:
        self._at -= count

    def forced(self) -> list[int]:
        return []


def constraint_of(limit, budget, *, opening, form=(A, B), call=()) -> StructuredAnswer:
    marks = ReasoningMarks((CLOSE,), opening, reopening=(OPEN, OPEN_2), call=call)
    reasoning = ReasoningConstraint(
        BudgetSettings(limit, budget, answer=3), marks, [END], None, [BLANK, END]
    )
    return StructuredAnswer(reasoning, Word(form))


def decode(constraint, limit, seed, *, drafts=False) -> list[int]:
    noise = torch.Generator().manual_seed(seed)
    scores = 3.0 * torch.randn(limit + 4, VOCABULARY, generator=noise)
    tokens: list[int] = []
    while len(tokens) < limit and not constraint.finished:
        ahead = int(torch.randint(0, 4, (), generator=noise)) if drafts else 0
        made = 0
        while made < ahead and not constraint.finished:
            constraint.advance(int(constraint.mask(scores[len(tokens) + made].flip(0)).argmax()))
            made += 1
        constraint.rollback(made)
        following = constraint.forced()
        token = int(constraint.mask(scores[len(tokens)]).argmax())
        assert not following or token == following[0]
        constraint.advance(token)
        tokens.append(token)
    return tokens


@settings(max_examples=200, deadline=None)
@given(
    st.integers(9, 30),
    st.none() | st.integers(0, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_the_answer_alone_is_of_the_form_and_the_reasoning_keeps_its_limit(
    limit, budget, begun, drafts, seed
):
    constraint = constraint_of(limit, budget, opening=() if begun else (OPEN, OPEN_2))
    tokens = decode(constraint, limit, seed, drafts=drafts)
    assert tokens[-3:] == [A, B, END]
    before = tokens[:-3]
    if begun or before:
        assert before[-1] == CLOSE and CLOSE not in before[:-1]
        reasoning = before[:-1] if begun else before[2:-1]
        assert begun or before[:2] == [OPEN, OPEN_2]
        assert len(reasoning) <= (limit if budget is None else budget)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 8), st.integers(4, 9), st.booleans(), st.integers(0, 2**16))
def test_a_call_within_the_reasoning_is_the_answers_and_is_not_cut(before, budget, drafts, seed):
    """Wherever in the reasoning it begins, all of it is read by the form."""
    constraint = constraint_of(40, budget, opening=(), form=(A, B, C, C, C, C, C, A), call=(A, B))
    tokens = [BLANK] * min(before, budget - 2)
    for token in (*tokens, A, B):
        constraint.advance(token)
    assert constraint.budget.phase is Phase.ANSWER
    rest = decode(constraint, 38 - len(tokens), seed, drafts=drafts)
    assert rest == [C, C, C, C, C, A, END]
    constraint.rollback(len(rest) + 1)
    assert constraint.budget.phase is Phase.REASONING and not constraint.finished
    for token in (B, *rest):
        constraint.advance(token)
    assert constraint.finished


def test_a_call_that_the_form_does_not_have_is_refused_and_nothing_moves():
    constraint = constraint_of(40, 9, opening=(), form=(A, A), call=(A, B))
    constraint.advance(A)
    with pytest.raises(DeliberateError, match="not of the form"):
        constraint.advance(B)
    for token in (CLOSE, A, A, END):
        constraint.advance(token)
    assert constraint.finished


def test_a_form_that_holds_the_opening_tag_begins_no_reasoning():
    constraint = constraint_of(20, 0, opening=(OPEN, OPEN_2), form=(OPEN, OPEN_2, A))
    assert decode(constraint, 20, 0) == [OPEN, OPEN_2, A, END]
    assert constraint.budget.phase is Phase.BEFORE


class Free(Word):
    """A form of any tokens, up to an end."""

    def mask(self, scores):
        return scores.clone()

    def advance(self, token: int) -> None:
        self._at += 1


@pytest.mark.parametrize("rolled_back", [False, True])
def test_an_answer_without_reasoning_does_not_hold_the_opening_tag(rolled_back):
    """A client that counts what is between the tags would count it as reasoning."""
    constraint = constraint_of(30, 0, opening=(OPEN, OPEN_2))
    constraint.form = Free(())
    constraint.advance(A)
    constraint.advance(OPEN)
    if rolled_back:
        constraint.advance(B)
        constraint.rollback(1)
    scores = torch.zeros(VOCABULARY)
    scores[OPEN_2] = 9.0
    assert constraint.mask(scores)[OPEN_2] == float("-inf")
    constraint.advance(B)
    assert constraint.mask(scores)[OPEN_2] == 9.0


def test_a_limited_answer_begins_no_further_reasoning():
    marks = ReasoningMarks((CLOSE,), (), reopening=(OPEN, OPEN_2))
    constraint = ReasoningConstraint(BudgetSettings(20, 2, answer=3), marks, [END])
    for token in (A, A, CLOSE, OPEN):
        constraint.advance(token)
    scores = torch.zeros(VOCABULARY)
    scores[OPEN_2] = 9.0
    assert constraint.mask(scores)[OPEN_2] == float("-inf")
    constraint.advance(A)
    assert constraint.mask(scores)[OPEN_2] == 9.0  # a part of the tag alone means nothing


@pytest.mark.parametrize(
    ("prompt", "chat", "begun"),
    [
        ([A, OPEN, OPEN_2], True, True),
        ([A, OPEN, OPEN_2, BLANK], True, True),
        ([OPEN, OPEN_2, A], True, False),  # a message that holds the tag
        ([OPEN, OPEN_2, A], False, True),
        ([OPEN, OPEN_2, A, CLOSE], False, False),
        ([OPEN, OPEN_2, CLOSE, OPEN, OPEN_2], True, True),
        ([A, OPEN], False, False),
        ([], False, False),
    ],
)
def test_a_prompt_may_have_begun_the_reasoning(prompt, chat, begun):
    marks = ReasoningMarks((CLOSE,), (OPEN, OPEN_2), reopening=(OPEN, OPEN_2))
    made = begun_in(marks, prompt, {BLANK}, chat=chat)
    assert made.opening == (() if begun else (OPEN, OPEN_2))
    assert made.reopening == (OPEN, OPEN_2)


class Tokenizer:
    unk_token_id = 0

    def __init__(self, known) -> None:
        self._known = known

    def convert_tokens_to_ids(self, tokens):
        return [self._known.get(token, 0) for token in tokens]


class Config:
    def __init__(self, **entries) -> None:
        vars(self).update(entries)


def test_a_models_tags_are_those_it_states_or_has_a_token_for():
    both = Tokenizer({"<think>": 5, "</think>": 6})
    assert reasoning_tags(both) == ("<think>", "</think>")
    assert reasoning_tags(both, Config(reasoning_tags=["[A]", "[B]"])) == ("[A]", "[B]")
    assert reasoning_tags(Tokenizer({"</think>": 6}), Config()) is None
