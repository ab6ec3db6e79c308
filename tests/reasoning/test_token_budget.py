"""The reasoning budget on scripted outputs: never exceeded, an answer left, nothing cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.reasoning.budget_state import Phase
from deliberate.reasoning.marks import ReasoningMarks, Utf8Ends
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.utils.errors import DeliberateError

# A vocabulary of 24: tags, an end, a blank, bytes of characters, and plain tokens.
OPEN, CLOSE, CLOSE_2, END, BLANK, WAIT, WAIT_2, CALL = range(8)
LEAD_2, LEAD_3, LEAD_4, TAIL = 8, 9, 10, 11
PLAIN, VOCABULARY = 12, 24
TOKENS = [None] * 8 + ["Ã", "æ", "ð", "¥"] + [chr(97 + i) for i in range(12)]
ENDS = Utf8Ends.of_tokens(TOKENS)


def test_what_a_token_leaves_open_is_read_from_its_bytes():
    assert ENDS.missing == {LEAD_2: 1, LEAD_3: 2, LEAD_4: 3}
    assert ENDS.continues == {TAIL: 1} and TAIL in ENDS.whole
    assert [ENDS.after(0, LEAD_4), ENDS.after(3, TAIL), ENDS.after(1, TAIL)] == [3, 2, 0]
    assert ENDS.after(2, PLAIN) == 0
    assert Utf8Ends.of_tokens(["<0xE4>", "<0xBD>"]).missing == {0: 2}


# Of closing tags of one token and of two: other ids that are written for them.
FORMS = {
    False: [(), (frozenset([CLOSE, PLAIN + 8]),)],
    True: [(), (frozenset([CLOSE, PLAIN + 8]), frozenset([CLOSE_2, PLAIN + 9, PLAIN + 10]))],
}


@st.composite
def outputs(draw):
    """A constraint's settings and marks, and a seed for the scores."""
    two = draw(st.booleans())
    marks = ReasoningMarks(
        closing=(CLOSE, CLOSE_2) if two else (CLOSE,),
        opening=(OPEN,) if draw(st.booleans()) else (),
        answer=(PLAIN, BLANK) if draw(st.booleans()) else (),
        call=(CALL,) if draw(st.booleans()) else (),
        closing_forms=draw(st.sampled_from(FORMS[two])),
    )
    answer = draw(st.integers(1, 4))
    least = len(marks.opening) + len(marks.handover) + answer
    budget = BudgetSettings(
        max_new_tokens=least + draw(st.integers(0, 30)),
        reasoning=draw(st.none() | st.integers(0, 25)),
        answer=answer,
        extensions=draw(st.integers(0, 2)),
        extension=(WAIT, WAIT_2) if draw(st.booleans()) else (WAIT,),
        suppressed=((PLAIN + 1,), (PLAIN + 2, PLAIN + 3)),
    )
    return marks, budget, draw(st.integers(0, 2**20))


def decode(marks, budget, seed, *, drafts):
    """An output of random scores; with drafts, runs of them are made and partly rolled back."""
    constraint = ReasoningConstraint(budget, marks, end_tokens=[END], ends=ENDS, blank=[BLANK, END])
    noise = torch.Generator().manual_seed(seed)
    scores = 3.0 * torch.randn(budget.max_new_tokens + 8, VOCABULARY, generator=noise)
    wrong = 3.0 * torch.randn(len(scores), VOCABULARY, generator=noise)
    tokens = []
    while len(tokens) < budget.max_new_tokens and (not tokens or tokens[-1] != END):
        ahead = int(torch.randint(0, 4, (), generator=noise)) if drafts else 0
        for place in range(len(tokens), len(tokens) + ahead):
            constraint.advance(int(constraint.mask(wrong[place]).argmax()))
        constraint.rollback(ahead)
        following = constraint.forced()
        token = int(constraint.mask(scores[len(tokens)]).argmax())
        assert not following or token == following[0]
        tokens.append(token)
        constraint.advance(token)
    return constraint, tokens


@settings(max_examples=300, deadline=None)
@given(outputs(), st.booleans())
def test_the_budget_is_never_exceeded_and_the_answer_is_never_empty(case, drafts):
    marks, budget, seed = case
    constraint, tokens = decode(marks, budget, seed, drafts=drafts)
    limit = budget.max_new_tokens if budget.reasoning is None else budget.reasoning
    assert constraint.reasoning_tokens <= limit
    assert len(tokens) <= budget.max_new_tokens
    assert constraint.phase is not Phase.REASONING
    assert constraint.extended <= budget.extensions
    if constraint.phase is Phase.ANSWER:
        assert constraint._states[-1].answered


@settings(max_examples=150, deadline=None)
@given(outputs())
def test_drafts_and_rollbacks_change_nothing(case):
    marks, budget, seed = case
    plain, tokens = decode(marks, budget, seed, drafts=False)
    noise = torch.Generator().manual_seed(seed)
    scores = 3.0 * torch.randn(budget.max_new_tokens + 8, VOCABULARY, generator=noise)
    again = ReasoningConstraint(budget, marks, end_tokens=[END], ends=ENDS, blank=[BLANK, END])
    for place, token in enumerate(tokens):
        for draft in range(min(3, budget.max_new_tokens - place - 1)):
            again.advance(int(again.mask(scores[place + draft].flip(0)).argmax()))
        again.rollback(len(again._tokens) - place)
        assert int(again.mask(scores[place]).argmax()) == token
        again.advance(token)
    assert again._states == plain._states


@settings(max_examples=150, deadline=None)
@given(outputs())
def test_what_the_mask_makes_of_a_greedy_choice_is_known_from_the_choice(case):
    marks, budget, seed = case
    constraint = ReasoningConstraint(
        budget, marks, end_tokens=[END], ends=ENDS, blank=[BLANK, END], greedy=True
    )
    noise = torch.Generator().manual_seed(seed)
    for scores in 3.0 * torch.randn(budget.max_new_tokens, VOCABULARY, generator=noise):
        chosen = int(scores.argmax())
        following, free = constraint.forced(), constraint.free()
        assert not (following and free)
        masked = following[0] if following else int(constraint.mask(scores).argmax())
        if free:
            assert constraint.changes(chosen) == (masked != chosen)
        constraint.advance(masked)
        if masked == END:
            break


def test_tokens_from_outside_take_the_place_of_those_that_were_to_follow():
    constraint = constraint_of(extensions=1, extension=(WAIT, PLAIN))
    scores = torch.zeros(VOCABULARY)
    scores[CLOSE] = 9.0
    assert int(constraint.mask(scores).argmax()) == WAIT
    constraint.advance(WAIT)
    assert constraint.forced() == [PLAIN]
    constraint.given([CLOSE])
    assert constraint.phase is Phase.ANSWER and constraint.extended == 1
    constraint.follow([WAIT])
    assert constraint.phase is Phase.REASONING


@settings(max_examples=150, deadline=None)
@given(outputs())
def test_no_character_and_no_suppressed_run_is_in_the_reasoning(case):
    marks, budget, seed = case
    budget = dataclasses.replace(budget, extensions=0)
    _, tokens = decode(marks, budget, seed, drafts=False)
    walk = ReasoningConstraint(budget, marks, end_tokens=[END], ends=ENDS, blank=[BLANK, END])
    for token in tokens:
        state, forced = walk._states[-1], walk.forced()
        if forced and state.phase is Phase.REASONING and not state.closing:
            assert state.need == 0  # a whole character stands before the forced closing tag
        walk.advance(token)
        if walk.phase is Phase.REASONING and not forced:
            assert token != PLAIN + 1 and tuple(walk._tokens[-2:]) != (PLAIN + 2, PLAIN + 3)


def constraint_of(call=(), **changes):
    given = {"max_new_tokens": 40, "answer": 4} | changes
    marks = ReasoningMarks(closing=(CLOSE,), call=call)
    return ReasoningConstraint(BudgetSettings(**given), marks, end_tokens=[END])


def test_the_end_of_reasoning_is_put_off_by_the_extension_at_most_so_often():
    constraint = constraint_of(extensions=2, extension=(WAIT, WAIT_2))
    wants_to_close = torch.zeros(VOCABULARY)
    wants_to_close[CLOSE] = 9.0
    made = []
    for _ in range(7):
        made.append(int(constraint.mask(wants_to_close).argmax()))
        constraint.advance(made[-1])
    assert made == [WAIT, WAIT_2, WAIT, WAIT_2, CLOSE, CLOSE, CLOSE]
    assert constraint.extended == 2 and constraint.phase is Phase.ANSWER


def test_an_end_within_the_reasoning_closes_it_with_the_whole_tag():
    marks = ReasoningMarks(closing=(CLOSE, CLOSE_2), answer=(PLAIN,))
    constraint = ReasoningConstraint(BudgetSettings(40, answer=4), marks, end_tokens=[END])
    ends = torch.zeros(VOCABULARY)
    ends[END] = 9.0
    constraint.advance(PLAIN)
    assert int(constraint.mask(ends).argmax()) == CLOSE
    constraint.advance(CLOSE)
    assert constraint.forced() == [CLOSE_2, PLAIN]
    constraint.rollback(1)
    begins = torch.zeros(VOCABULARY)
    begins[CLOSE] = 9.0  # of the model's own: it may break the tag off
    assert int(constraint.mask(begins).argmax()) == CLOSE
    constraint.advance(CLOSE)
    assert constraint.forced() == []
    constraint.rollback(1)
    constraint.mask(ends)
    constraint.rollback(1)
    constraint.advance(PLAIN)
    constraint.advance(CLOSE)  # nothing is known of this one
    assert constraint.forced() == []


def test_a_wait_of_the_models_own_is_no_extension():
    constraint = constraint_of(extensions=1, extension=(WAIT,))
    scores = torch.zeros(VOCABULARY)
    scores[WAIT] = 5.0
    constraint.mask(scores)
    constraint.advance(WAIT)
    assert constraint.extended == 0


def test_probability_moves_from_the_closing_tag_and_is_not_lost():
    constraint = constraint_of(extensions=1, extension=(WAIT,))
    scores = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    before, after = scores.softmax(0), constraint.mask(scores).softmax(0)
    assert after[CLOSE] == 0.0
    assert torch.isclose(after[WAIT], before[[WAIT, CLOSE, END]].sum())
    assert torch.allclose(after[PLAIN:], before[PLAIN:])


def test_a_tool_call_ends_the_reasoning_and_is_not_cut():
    constraint = constraint_of(reasoning=3, call=(CALL,))
    for token in (PLAIN, CALL, *[PLAIN] * 10):
        assert constraint.forced() == []
        constraint.advance(token)
    assert constraint.reasoning_tokens == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
        ({"max_new_tokens": 4}, "leaves no room: the tags and answer=4 take 5"),
        ({"reasoning": -1}, "reasoning=-1 must be"),
        ({"answer": 0}, "answer=0 must be"),
        ({"extensions": 1}, "extensions=1 without extension"),
        ({"suppressed": [[]]}, "suppressed has an empty run"),
    ],
)
def test_limits_that_cannot_work_are_refused(changes, words):
    with pytest.raises(DeliberateError, match=words):
        constraint_of(**changes)
    with pytest.raises(DeliberateError, match="closing is empty"):
        ReasoningMarks(closing=())


def test_another_token_than_the_forced_one_is_an_error():
    constraint = constraint_of(reasoning=1)
    constraint.advance(PLAIN)
    with pytest.raises(DeliberateError, match=f"token {PLAIN} where {CLOSE} must follow"):
        constraint.advance(PLAIN)
