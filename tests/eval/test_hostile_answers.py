"""What a model wrote is read in linear time, whatever it wrote."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import random
import re
import signal
import time
from re import _parser as parser
from typing import Any

import pytest

import deliberate.eval
import deliberate.train
from deliberate.data.problem import Problem, last_boxed
from deliberate.eval.benchmarks.repetition import fresh_characters
from deliberate.eval.grading.answers import STYLES, compare_exactly, extract_answer
from deliberate.eval.grading.exact_numbers import exact_number, says_more_than_a_number
from deliberate.eval.grading.graders import GraderPool, settle
from deliberate.eval.grading.latex_text import tidy

LENGTH = 100_000
# Ten times what the slowest reader takes on a slow machine; with the square of the length it would
# be minutes.
LIMIT = 0.5
# What the scanners look for, so that a random sequence meets their branches again and again.
ATOMS = (
    "18 ", "apples ", "(3 left)", "####", "#", "\\boxed{", "\\boxed ", "\\fbox{", "{", "}",
    "$", " ", "\t", "\n", "answer is ", "answer", ": ", ".", ". ", ",", "1,", "1,000", "1/", "/",
    "-", "−", "%", "\\frac", "\\frac{1}{", "\\text{", "\\text {ab}", "\\", "\\\\", "^", "^{2}",
    "^\\circ", "_", "~", "\\overline{3}", "(", ")", "a", "x = ", ":", "é", "9" * 40,
    " \\times 10^", "*", "\\!",
)  # fmt: skip


def _hostile() -> list[str]:
    texts = [(atom * (LENGTH // len(atom) + 1))[:LENGTH] for atom in ATOMS]
    draw = random.Random(0)
    for size in (2, 3, 5, 20):
        for _ in range(12):
            period = "".join(draw.choices(ATOMS, k=size))
            texts.append((period * (LENGTH // len(period) + 1))[:LENGTH])
    texts += ["".join(draw.choices(ATOMS, k=LENGTH // 6))[:LENGTH] for _ in range(8)]
    for head in ("the answer is ", "#### 18", "\\boxed{", "answer", "18"):
        for body in (" ", "\n", "{", "apples ", "\\text{ab}", "1,"):
            texts.append((head + body * LENGTH)[:LENGTH] + "!")
    return texts


def _seconds(call) -> float:
    """The least of several times of this thread: the machine may be busy, the scanner not slow."""
    best = float("inf")
    for _ in range(6):
        began = time.thread_time()
        call()
        best = min(best, time.thread_time() - began)
        if best < LIMIT:
            break
    return best


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_is_taken_out_of_any_text_in_linear_time(style):
    slow = [t[:60] for t in _hostile() if _seconds(lambda t=t: extract_answer(t, style)) > LIMIT]
    assert slow == []


@pytest.mark.parametrize("style", STYLES)
def test_any_answer_is_compared_in_linear_time(style):
    # Both what is cut off by length and what is just short enough to be read.
    answers = [text[:length] for text in _hostile() for length in (200, 2000, LENGTH)]
    slow = [
        (answer[:60], len(answer))
        for answer in answers
        for reference in ("18", r"\frac{1}{2}")
        if _seconds(lambda a=answer, r=reference: compare_exactly(a, r, style)) > LIMIT
    ]
    assert slow == []


@pytest.mark.parametrize(
    "reader",
    [last_boxed, tidy, exact_number, says_more_than_a_number],
    ids=lambda reader: reader.__name__,
)
def test_every_reader_of_model_text_is_linear(reader):
    slow = [t[:60] for t in _hostile() if _seconds(lambda t=t: reader(t)) > LIMIT]
    assert slow == []


def test_repetition_is_counted_in_linear_time():
    for text in ("a " * (LENGTH // 2), "".join(map(chr, range(33, 90))) * (LENGTH // 57)):
        assert _seconds(lambda t=text: fresh_characters(t)) < 10 * LIMIT


def _repeats_a_repetition(parsed: Any, inside: bool = False) -> bool:
    """Whether an unbounded repetition that gives back holds another one: exponential at worst."""
    for code, value in parsed:
        unbounded = code in (parser.MAX_REPEAT, parser.MIN_REPEAT) and value[1] is parser.MAXREPEAT
        if unbounded and inside:
            return True
        held = value if isinstance(value, tuple | list) else (value,)
        for part in held:
            branches = part if isinstance(part, list) else [part]
            for branch in branches:
                if isinstance(branch, parser.SubPattern) and _repeats_a_repetition(
                    branch, inside or unbounded
                ):
                    return True
    return False


def test_no_pattern_of_eval_or_train_repeats_a_repetition():
    found = []
    for package in (deliberate.eval, deliberate.train):
        for entry in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            source = inspect.getsource(importlib.import_module(entry.name))
            patterns = {
                node.args[0].value
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and getattr(node.func.value, "id", "") == "re"
                and node.args
                and isinstance(node.args[0], ast.Constant)
            }
            for value in vars(importlib.import_module(entry.name)).values():
                if isinstance(value, re.Pattern):
                    patterns.add(value.pattern)
            found += [(entry.name, p) for p in patterns if _repeats_a_repetition(parser.parse(p))]
    assert found == []


def test_the_texts_that_took_a_minute_are_graded_at_once():
    began = time.thread_time()
    assert settle("#### 18 " + "apples " * 24 + "(3 left)", "18", "gsm8k").correct is False
    assert extract_answer("\\boxed{" * 20_000, "boxed") is None
    assert time.thread_time() - began < 4 * LIMIT


def test_a_computation_without_end_stops_at_the_time_limit():
    with GraderPool(processes=1, time_limit=2.0) as pool:
        pool.grade_many([(r"\boxed{\sqrt{8}}", r"2\sqrt{2}", "boxed")])
        tower = r"\boxed{\sum_{n=1}^{10^{9}} \sin(n!)}"
        grade = pool.grade_many([(tower, r"2\sqrt{2}", "boxed")])[0]  # it would take hours
    assert not grade.correct and grade.method == "timeout"


def test_a_scorer_that_hangs_is_stopped_at_the_time_limit():
    problem = Problem(id="x", question="q?", answer="1", source="reasoning_gym/chain_sum")
    with GraderPool(processes=1, time_limit=3.0) as pool:
        pool.score_many([(problem, "#### 1", "gsm8k")])
        os.kill(pool._workers[0].process.pid, signal.SIGSTOP)
        got = pool.score_many([(problem, "#### 1", "gsm8k"), (problem, "no mark", "gsm8k")])
    assert [(g.correct, g.method) for g in got] == [(False, "timeout"), (False, "no_answer")]
