"""The word-problem grammar: true solutions, known difficulty, disjoint splits."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.data.word_problems import (
    FAMILIES,
    MAX_STEPS,
    MIN_STEPS,
    draw_in_split,
    split_of,
    word_problem,
    word_problems,
)
from deliberate.utils.errors import DeliberateError

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
seeds = st.integers(0, 2**32)
steps_of = st.integers(MIN_STEPS, MAX_STEPS)


def equations(problem):
    return [
        (int(a), sign, int(b), int(result))
        for a, sign, b, result in EQUATION.findall(problem.solution)
    ]


@given(seeds, steps_of)
def test_every_solution_line_is_one_true_equation_and_they_count_the_steps(seed, steps):
    problem = word_problem(random.Random(seed), steps)
    *work, last = problem.solution.split("\n")
    assert [len(EQUATION.findall(line)) for line in work] == [1] * steps
    assert problem.difficulty == steps
    for a, sign, b, result in equations(problem):
        assert min(a, b, result) >= 1
        true = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        assert result == true
    assert last == f"#### {problem.answer}"
    assert equations(problem)[-1][3] == int(problem.answer)


@given(seeds, steps_of)
def test_every_step_continues_from_the_one_before(seed, steps):
    problem = word_problem(random.Random(seed), steps)
    value = product = None
    for number, (a, sign, b, result) in enumerate(equations(problem)):
        bought = problem.subject == "shopping" or (problem.subject == "work" and number)
        if sign == "*" and bought:
            product = result  # a price or a wage, which the next line uses
            continue
        assert value is None or a == value
        assert product is None or b == product
        value, product = result, None


def test_every_family_is_drawn():
    rng = random.Random(0)
    assert {word_problem(rng, 3).subject for _ in range(200)} == set(FAMILIES)


def test_equal_seeds_give_equal_problems_and_others_do_not():
    first = list(word_problems("train", size=30, seed=4))
    assert first == list(word_problems("train", size=30, seed=4))
    assert first != list(word_problems("train", size=30, seed=5))


@settings(max_examples=15, deadline=None)
@given(seeds, seeds)
def test_train_and_test_never_meet_whatever_the_seeds(train_seed, test_seed):
    train = {p.question for p in word_problems("train", size=40, seed=train_seed)}
    test = {p.question for p in word_problems("test", size=40, seed=test_seed)}
    assert not train & test
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in test} == {"test"}


def test_the_split_of_a_text_does_not_hang_on_case_or_outer_space():
    for problem in word_problems("test", size=20):
        assert split_of(f"  {problem.question.upper()}\n") == "test"


def test_one_problem_in_eight_is_for_testing():
    rng = random.Random(1)
    share = sum(split_of(word_problem(rng, 3).question) == "test" for _ in range(4000)) / 4000
    assert abs(share - 1 / 8) < 0.02


def test_difficulties_are_spread_evenly_over_distinct_questions():
    problems = list(word_problems("test", size=60, seed=2, steps=(2, 6)))
    assert [sum(p.difficulty == n for p in problems) for n in range(1, 7)] == [0, *[12] * 5]
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 60


@pytest.mark.parametrize("steps", [0, -1, 7])
def test_steps_outside_the_grammar_are_refused(steps):
    with pytest.raises(DeliberateError, match=f"steps is {steps}"):
        word_problem(random.Random(0), steps)


def test_an_unknown_split_is_refused():
    with pytest.raises(DeliberateError, match="'dev'"):
        draw_in_split(random.Random(0), "dev", lambda rng: word_problem(rng, 1))
