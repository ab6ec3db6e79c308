"""Data sources: the local folder, the hub's columns, reasoning-gym, and what may be trained on."""

from __future__ import annotations

import json
import os
import re

import pytest

from deliberate.data import sources
from deliberate.data.problem import Problem, last_boxed
from deliberate.data.sources import (
    DATA_VARIABLE,
    NO_SINGLE_ANSWER,
    chain_sum_steps,
    check_training_sources,
    data_fingerprint,
    load_problems,
    load_reasoning_gym,
    score_reasoning_gym,
    solve_prefix,
)
from deliberate.utils.errors import DeliberateError

needs_data = pytest.mark.skipif(
    not os.environ.get(DATA_VARIABLE), reason=f"{DATA_VARIABLE} names no folder of data sets"
)
GSM8K = {
    "id": "g/0",
    "question": "How many? ",
    "answer": "42",
    "solution": "12 x 2 = <<12*2=24>>24 pages.\n24 + 18 = <<24+18=42>>42 pages.\n#### 42",
    "licence": "MIT",
}
MATH = {"question": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": 3,
        "subject": "Algebra"}  # fmt: skip
MAWPS = {"question": "Total?", "answer": "504", "equation": "* number0 number1",
         "numbers": "56.0 9.0"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def write(name, split, *rows):
        path = tmp_path / name / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path

    return write


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_gsm8k_loses_its_calculator_annotations_and_keeps_the_marked_answer(folder):
    (problem,) = load_problems("gsm8k", "train", data_dir=folder("gsm8k", "train", GSM8K))
    assert problem == Problem(
        id="g/0",
        question="How many?",
        answer="42",
        solution="12 x 2 = 24 pages.\n24 + 18 = 42 pages.\n#### 42",
        source="gsm8k",
        difficulty=2,
        metadata={"licence": "MIT", "split": "train"},
    )


def test_a_gsm8k_row_in_the_hub_form_gives_the_same_problem(folder):
    hub_row = {
        "question": GSM8K["question"],
        "answer": GSM8K["solution"].replace("#### 42", "#### 1,042"),
    }
    got = sources.problem_from_row("gsm8k", "test", 7, hub_row, "row 7")
    assert (got.answer, got.difficulty, got.id) == ("1042", 2, "gsm8k/test/7")
    assert got.solution == "12 x 2 = 24 pages.\n24 + 18 = 42 pages.\n#### 1042"


def test_a_gsm8k_solution_without_annotations_has_no_known_difficulty(folder):
    row = {**GSM8K, "solution": "It is 42.\n#### 42"}
    (problem,) = load_problems("gsm8k", "train", data_dir=folder("gsm8k", "train", row))
    assert problem.difficulty is None


def test_math_takes_the_answer_from_the_last_box_and_the_level_as_difficulty(folder):
    no_level = {**MATH, "level": None, "answer": "7"}
    first, second = load_problems("math", "test", data_dir=folder("math", "test", MATH, no_level))
    assert (first.answer, first.difficulty, first.subject) == (r"\frac{1}{2}", 3, "Algebra")
    assert (second.answer, second.difficulty) == ("7", None)


def test_math_rows_of_the_hub_map_problem_type_and_level():
    row = {"problem": "Q", "solution": r"\boxed{5}", "level": "Level 4", "type": "Geometry"}
    got = sources.problem_from_row("math", "train", 0, row, "row 0")
    assert (got.question, got.answer, got.difficulty, got.subject) == ("Q", "5", 4, "Geometry")
    unknown = sources.problem_from_row("math", "train", 0, {**row, "level": "Level ?"}, "row 0")
    assert unknown.difficulty is None


def test_a_math_row_whose_box_is_empty_is_left_out(folder, caplog):
    broken = {**MATH, "answer": "", "solution": r"There are $\boxed{}$ primes."}
    data_dir = folder("math", "train", broken, MATH)
    assert len(load_problems("math", "train", data_dir=data_dir, limit=1)) == 1
    assert "train.jsonl:1 left out" in caplog.text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\fbox{ 3 }", "3"),
        (r"$\boxed 7$.", "7"),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"\boxedtext{5}", None),
        ("none", None),
    ],
)
def test_the_last_complete_box_is_found(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("equation", "numbers", "answer", "solution", "steps"),
    [
        ("* number0 number1", "56.0 9.0", "504", "56 * 9 = 504\n#### 504", 1),
        ("/ - number0 number1 number2", "21 12 3", "3", "21 - 12 = 9\n9 / 3 = 3\n#### 3", 2),
        ("- number1 * number0 0.5", "3 2.50", "1", "3 * 0.5 = 1.5\n2.5 - 1.5 = 1\n#### 1", 2),
        ("+ number0 number1", "0.1 0.2", "0.3", "0.1 + 0.2 = 0.3\n#### 0.3", 1),
        ("/ number0 number1", "2 3", "0.6666666666666666",
         "2 / 3 = 0.6666666666666666\n#### 0.6666666666666666", 1),
        ("/ number0 number1", "2.99 12.0", "0.25", "#### 0.25", None),
        ("/ number0 number1", "1 0", "5", "#### 5", None),
        ("+ number0 number9", "1 2", "3", "#### 3", None),
        ("+ number0", "1 2", "3", "#### 3", None),
        ("+ number0 number1 number1", "1 2", "3", "#### 3", None),
        ("", "", "3", "#### 3", None),
    ],
)  # fmt: skip
def test_a_prefix_equation_becomes_steps_only_if_it_gives_the_answer(
    equation, numbers, answer, solution, steps
):
    assert solve_prefix(equation, numbers, answer) == (solution, steps)


def test_mawps_rows_read_like_the_other_sources(folder):
    row = {**MAWPS, "answer": "504.0"}
    (problem,) = load_problems("mawps", "train", data_dir=folder("mawps", "train", row))
    assert (problem.answer, problem.solution) == ("504", "56 * 9 = 504\n#### 504")


def test_the_folder_comes_from_the_argument_before_the_environment(folder, monkeypatch, tmp_path):
    data_dir = folder("gsm8k", "train", GSM8K)
    monkeypatch.setenv(DATA_VARIABLE, str(data_dir))
    assert len(load_problems("gsm8k", "train")) == 1
    with pytest.raises(DeliberateError, match="elsewhere"):
        load_problems("gsm8k", "train", data_dir=tmp_path / "elsewhere")


def test_without_a_folder_all_three_ways_are_named(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(DeliberateError) as error:
        load_problems("gsm8k", "test")
    message = one_line(error)
    assert all(way in message for way in ("data.dir=", DATA_VARIABLE, "openai/gsm8k"))


def test_a_missing_split_is_named_with_what_is_there(folder):
    with pytest.raises(DeliberateError) as error:
        load_problems("gsm8k", "test", data_dir=folder("gsm8k", "train", GSM8K))
    assert re.search(r"no gsm8k/test\.jsonl .*there is gsm8k/train", one_line(error))


def test_an_unknown_data_set_is_named_with_the_known_ones():
    with pytest.raises(DeliberateError, match=r"'gsm9k': one of gsm8k, math"):
        load_problems("gsm9k", "test")


@pytest.mark.parametrize(
    ("row", "pattern"),
    [
        ('{"question": "a", ', r"train\.jsonl:2: not valid JSON .*question"),
        ("[1]", r"train\.jsonl:2 is a list"),
        ({"answer": "3"}, r"train\.jsonl:2 has no 'question' or 'problem': .* answer$"),
        ({"question": "a", "answer": " "}, r"train\.jsonl:2 has no 'answer': .*question"),
        ({"question": "a", "answer": "x ####"}, r"train\.jsonl:2 has nothing after"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(folder, row, pattern):
    with pytest.raises(DeliberateError) as error:
        load_problems("gsm8k", "train", data_dir=folder("gsm8k", "train", GSM8K, row))
    assert re.search(pattern, one_line(error))


def test_a_math_row_without_answer_and_box_is_refused(folder):
    data_dir = folder("math", "train", {"question": "a", "solution": "so 5"})
    with pytest.raises(DeliberateError, match=r"train\.jsonl:1 has neither"):
        load_problems("math", "train", data_dir=data_dir)


def test_limit_takes_the_first_rows_and_reads_no_further(folder):
    data_dir = folder("gsm8k", "train", GSM8K, {**GSM8K, "id": "g/1"}, "broken")
    assert [p.id for p in load_problems("gsm8k", "train", data_dir=data_dir, limit=2)] == [
        "g/0",
        "g/1",
    ]
    with pytest.raises(DeliberateError, match="limit=0"):
        load_problems("gsm8k", "train", data_dir=data_dir, limit=0)


def test_an_empty_file_is_an_error(folder):
    with pytest.raises(DeliberateError, match="has no rows"):
        load_problems("gsm8k", "train", data_dir=folder("gsm8k", "train"))


@pytest.mark.parametrize(
    ("hub", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", "main")),
        ("someone/copy:other", ("someone/copy", "other")),
    ],
)
def test_a_hub_name_is_loaded_through_datasets(monkeypatch, hub, asked):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, split):
        calls.append((*args, split))
        return [{"question": "Q", "answer": "so\n#### 5"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = load_problems("gsm8k", "test", hub=hub)
    assert (problem.answer, calls) == ("5", [(*asked, "test")])


def test_an_unreachable_hub_is_a_one_line_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, split):
        raise ConnectionError("could not reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DeliberateError) as error:
        load_problems("gsm8k", "test", hub="openai/gsm8k")
    assert "'openai/gsm8k' (config main, split test)" in one_line(error)


@pytest.mark.parametrize("wrong", [{"question": ""}, {"answer": "  "}, {"answer": None}])
def test_a_problem_without_question_or_answer_cannot_be_built(wrong):
    with pytest.raises(DeliberateError, match="'p' has"):
        Problem(**{"id": "p", "question": "q", "answer": "a", **wrong})


def test_the_fingerprint_depends_on_content_and_order_only():
    a = Problem(id="a", question="q", answer="1", metadata={"x": 1, "y": (2, 3)})
    same = Problem(id="a", question="q", answer="1", metadata={"y": (2, 3), "x": 1})
    b = Problem(id="b", question="q", answer="1")
    assert data_fingerprint([a, b]) == data_fingerprint([same, b])
    assert len({data_fingerprint(ps) for ps in ([a, b], [b, a], [a], [])}) == 4
    assert re.fullmatch("[0-9a-f]{64}", data_fingerprint([a]))


def test_chain_sum_comes_with_true_steps_to_its_answer():
    problems = load_reasoning_gym("chain_sum", size=40, seed=3, max_terms=5, allow_negation=True)
    assert len(problems) == 40
    assert {p.difficulty for p in problems} == {1, 2, 3, 4}
    for problem in problems:
        *steps, last = problem.solution.split("\n")
        assert last == f"#### {problem.answer}"
        assert len(steps) == problem.difficulty
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert eval(problem.metadata["expression"]) == int(problem.answer)
        assert score_reasoning_gym(problem, problem.answer) == 1.0
        assert score_reasoning_gym(problem, str(int(problem.answer) + 1)) < 1.0


def test_a_sum_of_one_term_has_no_step():
    assert chain_sum_steps("5") == ("#### 5", 0)


def test_reasoning_gym_is_reproducible_from_its_seed():
    first, again, other = (
        data_fingerprint(load_reasoning_gym("chain_sum", size=5, seed=s)) for s in (1, 1, 2)
    )
    assert first == again != other


def test_a_data_set_that_accepts_several_answers_scores_with_its_own_rule():
    (problem,) = load_reasoning_gym("graph_color", size=1, seed=0)
    assert problem.answer == NO_SINGLE_ANSWER
    options = problem.metadata["possible_answer"]
    assert score_reasoning_gym(problem, json.dumps({str(k): v for k, v in options.items()})) == 1.0
    assert score_reasoning_gym(problem, "{}") < 1.0


def test_an_unknown_gym_name_is_answered_with_close_matches():
    with pytest.raises(DeliberateError, match=r"'chain_sums': did you mean chain_sum"):
        load_reasoning_gym("chain_sums", size=1, seed=0)


def test_a_parameter_that_a_gym_set_does_not_take_is_named():
    with pytest.raises(DeliberateError, match=r"chain_sum does not accept .*max_turms"):
        load_reasoning_gym("chain_sum", size=1, seed=0, max_turms=3)


def test_scoring_a_problem_of_another_source_by_the_gym_is_refused():
    with pytest.raises(DeliberateError, match="not reasoning_gym"):
        score_reasoning_gym(Problem(id="a", question="q", answer="1", source="gsm8k"), "1")


@pytest.mark.parametrize(
    ("train", "evaluated", "reason"),
    [
        (["reasoning_gym/gsm_symbolic"], ["gsm8k/test"], "rewritten GSM8K test problems"),
        (["gsm_symbolic"], [], "rewritten GSM8K test problems"),
        (["gsm8k/train", "gsm8k/test"], [], "a test split"),
        (["math500/train"], [], "a test split"),
        (["math/train"], ["math/train"], "evaluates on the same split"),
    ],
)
def test_training_on_what_is_evaluated_is_refused(train, evaluated, reason):
    with pytest.raises(DeliberateError, match=reason) as error:
        check_training_sources(train, evaluated)
    assert repr(train[-1]) in one_line(error)


def test_ordinary_training_sources_pass():
    check_training_sources(
        ["words", "reasoning_gym/chain_sum", "gsm8k/train", "mawps/train", "asdiv_a/train"],
        ["gsm8k/test", "reasoning_gym/gsm_symbolic", "reasoning_gym/chain_sum", "words"],
    )


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("math", "train", 7498),
        ("math", "test", 5000),
        ("math500", "test", 500),
        ("mawps", "train", 1920),
        ("asdiv_a", "train", 1217),
    ],
)
def test_the_published_splits_load_whole(name, split, count):
    problems = load_problems(name, split)
    assert len(problems) == len({p.id for p in problems}) == count
    assert sum(p.difficulty is None for p in problems) < 0.02 * count
    assert not any("<<" in p.solution for p in problems if name == "gsm8k")
    if name not in ("math", "math500"):
        assert all(p.solution.endswith(f"#### {p.answer}") for p in problems)
