"""The grammar of chains: true equations, an answer that stays, and doubt that is corrected."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deliberate.data.chains import CLOSE_TAG, OPEN_TAG, AnswerPoint, chain_problem, chain_problems
from deliberate.data.word_problems import MAX_STEPS, MIN_STEPS, split_of, word_problem
from deliberate.eval.grading.answers import extract_answer
from deliberate.train.tokenizer import train_tokenizer
from deliberate.utils.errors import DeliberateError

STATED = re.compile(r"(?:So it is|gives|answer is) (\d+)")
seeds, steps_of = st.integers(0, 2**32), st.integers(MIN_STEPS, MAX_STEPS)


def thinking(problem):
    return problem.solution.partition(CLOSE_TAG)[0]


@given(seeds, steps_of)
def test_a_chain_thinks_between_tags_and_ends_in_the_answer_of_its_word_problem(seed, steps):
    problem = chain_problem(random.Random(seed), steps)
    same = word_problem(random.Random(seed), steps)
    assert (problem.question, problem.answer) == (same.question, same.answer)
    assert problem.solution.startswith(f"{OPEN_TAG}\n")
    assert problem.solution.endswith(f"\n{CLOSE_TAG}\n#### {problem.answer}")
    assert extract_answer(problem.solution, "gsm8k") == problem.answer


@given(seeds, steps_of)
def test_from_the_answer_point_on_no_other_answer_is_stated(seed, steps):
    problem = chain_problem(random.Random(seed), steps)
    point = AnswerPoint.of(problem)
    before = problem.solution[: point.determined_at]
    assert before.endswith(problem.answer)
    after = STATED.findall(thinking(problem)[point.determined_at :])
    assert after and set(after) == {problem.answer}
    wrong = set(STATED.findall(before)) - {problem.answer}
    assert point.doubtful == bool(wrong)
    assert point.doubtful == before.endswith(f" So it is {problem.answer}")


@settings(max_examples=40)
@given(seeds, steps_of)
def test_a_chain_goes_on_after_its_answer_unless_it_has_no_check(seed, steps):
    problem = chain_problem(random.Random(seed), steps)
    point = AnswerPoint.of(problem)
    assert thinking(problem).count(" check: ") + thinking(problem).count(" check, ") == point.checks
    assert point.checks <= 4


def test_shares_of_doubt_and_of_thinking_after_the_answer():
    problems = list(chain_problems("train", size=1200, seed=3))
    points = [AnswerPoint.of(problem) for problem in problems]
    assert 0.10 < sum(point.doubtful for point in points) / len(points) < 0.20
    known = sum(p.determined_at for p in points) / sum(len(p.solution) for p in problems)
    assert known < 0.4  # at least 60 % of the text comes after the answer


def test_the_answer_point_in_tokens_is_where_the_number_ends():
    problems = list(chain_problems("train", size=60, seed=1))
    tokenizer = train_tokenizer((p.solution for p in problems), 600, marks=(OPEN_TAG, CLOSE_TAG))
    for problem in problems:
        coded = tokenizer(problem.solution, return_offsets_mapping=True)
        point = AnswerPoint.of(problem)
        token = point.token(coded["offset_mapping"])
        assert tokenizer.decode(coded["input_ids"][:token]).endswith(problem.answer)
        assert coded["input_ids"].count(tokenizer.convert_tokens_to_ids(CLOSE_TAG)) == 1


def test_splits_are_those_of_the_questions_and_draws_are_seeded():
    first = list(chain_problems("test", size=30, seed=5))
    assert first == list(chain_problems("test", size=30, seed=5))
    assert {split_of(problem.question) for problem in first} == {"test"}
    assert len({problem.question for problem in first}) == 30


def test_other_problems_have_no_answer_point():
    with pytest.raises(DeliberateError, match="is from 'words': only 'chains'"):
        AnswerPoint.of(word_problem(random.Random(0), 2))
