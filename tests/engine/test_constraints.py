"""A constraint's cursor: where it is, and how often it was moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deliberate.engine.constraints import ConstraintCursor, confidence_of, only
from deliberate.modeling.measures import MEASURES
from deliberate.trace import TokenRecord
from deliberate.utils.errors import DeliberateError


class Recorded:
    """Keeps the tokens that it has been advanced by, and counts its moves."""

    def __init__(self):
        self.tokens, self.advanced, self.removed, self.asked = [], 0, 0, 0

    @property
    def finished(self):
        return len(self.tokens) >= 5

    def mask(self, scores):
        return scores

    def advance(self, token):
        self.tokens.append(token)
        self.advanced += 1

    def rollback(self, count):
        assert 0 < count <= len(self.tokens)
        del self.tokens[len(self.tokens) - count :]
        self.removed += count

    def forced(self):
        self.asked += 1
        return [sum(self.tokens) % 7]


def records(tokens):
    return [TokenRecord(token, 0, 1.0, 0.0, True) for token in tokens]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 9)),
            st.tuples(st.just("cut"), st.integers(0, 12)),
            st.tuples(st.just("seek"), st.integers(0, 12)),
        ),
        max_size=40,
    )
)
def test_the_constraint_always_holds_the_first_tokens_of_the_sequence(moves):
    constraint = Recorded()
    cursor, made = ConstraintCursor(constraint), records([])
    for move, value in moves:
        if move == "add":
            made += records([value])
        elif move == "cut":
            del made[value:]
            cursor.cut(len(made))
        else:
            cursor.seek(made, min(value, len(made)))
            assert cursor.held == min(value, len(made))
        assert constraint.tokens == [record.token for record in made[: cursor.held]]
        assert constraint.advanced - constraint.removed == cursor.held
    cursor.seek(made, len(made))
    assert constraint.tokens == [record.token for record in made]


def test_a_token_that_is_kept_advances_the_constraint_once_and_a_rejected_one_is_taken_off():
    constraint = Recorded()
    cursor, made = ConstraintCursor(constraint), records([1, 2, 3, 4])
    cursor.seek(made, 4)
    del made[2:]
    cursor.cut(2)
    made += records([9])
    cursor.seek(made, 3)
    assert constraint.tokens == [1, 2, 9]
    assert (constraint.advanced, constraint.removed) == (5, 2)


def test_forced_tokens_are_asked_for_once_a_state():
    constraint = Recorded()
    cursor, made = ConstraintCursor(constraint), records([1, 2])
    assert [cursor.forced(made, 1) for _ in range(3)] == [[1]] * 3
    assert cursor.forced(made, 2) == [3]
    assert cursor.forced(made, 1) == [1]
    assert constraint.asked == 3
    assert not cursor.finished(made)
    assert cursor.finished(made + records([0] * 3))


def test_drafts_are_cut_where_one_is_not_allowed_or_ends_the_output():
    class Rising(Recorded):
        def advance(self, token):
            if self.tokens and token <= self.tokens[-1]:
                raise DeliberateError("not allowed")
            super().advance(token)

    constraint = Rising()
    cursor, made = ConstraintCursor(constraint), records([1, 2])
    assert cursor.allowed(made, [3, 4, 4, 5]) == [3, 4]
    assert cursor.allowed(made, [2]) == []
    assert cursor.allowed(made, [3, 4, 5, 6]) == [3, 4]  # the fifth token ends it
    assert cursor.finishes(records([1, 2, 3, 4]), 5) and not cursor.finishes(made, 5)
    cursor.seek(made, 2)
    assert constraint.tokens == [1, 2]


def test_scores_of_a_forced_token_leave_no_other():
    scores = only(2, 4)
    assert scores.shape == (1, 4)
    assert scores.softmax(-1).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("name", MEASURES)
def test_a_confidence_is_taken_over_the_tokens_that_are_left(name):
    measure = MEASURES[name]
    logits = torch.tensor([3.0, -torch.inf, 1.0, -torch.inf, 0.5])
    expected = float(measure.score(torch.tensor([3.0, 1.0, 0.5]))[1])
    assert confidence_of(measure, logits) == pytest.approx(expected)
    assert confidence_of(measure, torch.tensor([-torch.inf, -9.0])) == 1.0
