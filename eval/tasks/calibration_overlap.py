"""Keeps the problems of an evaluation apart from those of the model's calibration, by content.

Another seed does not do it: a grammar's short problems are few, so two seeds draw some in common,
and a data set can hold one question in both of its splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from deliberate.calibration.calibration import Calibration
from deliberate.data import seeds
from deliberate.data.problem import Problem
from deliberate.eval.tasks.registry import build_task
from deliberate.eval.tasks.task import Task

QUESTIONS = "questions"
"""Key of a recording's meta data that holds the keys of its problems."""


def question_key(question: str) -> str:
    """A short hash of a question, whatever its case and white space."""
    text = " ".join(question.lower().split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def question_keys(problems: Iterable[Problem]) -> list[str]:
    """The keys of problems, sorted, each once."""
    return sorted({question_key(problem.question) for problem in problems})


def calibration_questions(calibration: Calibration) -> frozenset[str] | None:
    """Keys of the problems that a calibration was fitted and tested on.

    Calibrations of earlier releases do not hold them: where the problems are drawn by a generator
    they are drawn again. None where they cannot be known.
    """
    recorded = calibration.meta.get("recorded") or {}
    if QUESTIONS in recorded:
        return frozenset(map(str, recorded[QUESTIONS]))
    try:
        return frozenset(question_keys(_drawn_again(calibration.meta["config"], calibration.data)))
    except (KeyError, TypeError, ValueError):
        return None


def set_apart(
    task: Task, calibration: Calibration | None, rebuild: Callable[[Callable[[str], bool]], Task]
) -> tuple[Task, list[str]]:
    """The task without problems of the calibration, and what was done, in words.

    Args:
        rebuild: makes the task again without the questions that it is told to exclude.
    """
    if calibration is None:
        return task, []
    taken = calibration_questions(calibration)
    if taken is None:
        return task, [
            "the calibration does not say which problems it was made from, so some of them may "
            "be among those of this run"
        ]
    shared = sum(question_key(problem.question) in taken for problem in task.problems)
    if not shared:
        return task, []
    apart = rebuild(lambda question: question_key(question) in taken)
    how = "replaced" if len(apart.problems) == len(task.problems) else "left out"
    return apart, [f"{shared} problems that the calibration was made from were {how}"]


def _drawn_again(config: Any, data: str) -> tuple[Problem, ...]:
    """The problems of a calibration's configuration, if they are those that it states."""
    settings = dict(config["task"])
    # Earlier releases named the problems' source instead of their reader.
    grammars = ("word_problems", "chains")
    if settings.get("reader") not in grammars and settings.get("source") != "words":
        raise ValueError("only word problems are drawn again")
    settings["size"] = config["size"]
    drawn = build_task(settings, seed=config["seed"], use=seeds.CALIBRATION)
    if drawn.data_sha256 != data:
        raise ValueError("drawn by another release")
    return drawn.problems
