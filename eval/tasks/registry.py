"""Tasks: which problems are put to a model, in what words, and how the answers are judged.

The same problems in the same order for every mode. Problems that a generator draws come from the
side of the hash split that training never draws from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from typing import Any

from omegaconf import DictConfig

from deliberate.data.problem import Problem
from deliberate.data.sources import (
    EVALUATION_ONLY,
    data_fingerprint,
    load_problems,
    load_reasoning_gym,
)
from deliberate.data.word_problems import MAX_STEPS, MIN_STEPS, split_of, word_problems
from deliberate.eval.grading.answer_style import answer_style
from deliberate.eval.grading.answers import STYLES, Style
from deliberate.eval.grading.graders import Grade, GraderPool
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

FIXED = ("gsm8k", "math", "math500")
VERBATIM = ("model", "out", "data.dir")
TRAIN_ONLY = ("mawps", "asdiv_a")
GYM_SEEDS = 100
"""reasoning-gym draws item i from seed + i: each of the seeds 0..99 has a range of its own, and
all of them end below the range that training draws from."""
_GYM_STRIDE = 100_000


FLEXIBLE: Style = "auto"


@dataclass(frozen=True)
class Verdict:
    """The grade of an answer, and whether it is correct by the two filters.

    Attributes:
        grade: by the task's style: what the figures count.
        strict: correct behind the task's mark.
        flexible: correct wherever the answer is found.
    """

    grade: Grade
    strict: bool
    flexible: bool


@dataclass(frozen=True)
class Task:
    """Problems and how they are asked and judged.

    Attributes:
        problems: in the order in which they are run.
        template: prompt with ``{question}``.
        style: how the final answer is marked, see `extract_answer`; what counts as correct.
        mark: the strict style: answers without this mark are none. None: the same as `style`.
        max_new_tokens: at most so many tokens an answer.
        own_score: judged by the data set's own score (reasoning-gym); correct = a score of 1.
    """

    name: str
    split: str
    problems: tuple[Problem, ...]
    template: str
    style: Style
    max_new_tokens: int
    own_score: bool = False
    mark: Style | None = None

    def __post_init__(self) -> None:
        if not self.problems:
            raise DeliberateError(f"task {self.name!r} has no problems")
        if self.style not in STYLES:
            raise DeliberateError(f"task.style={self.style!r} is not one of {', '.join(STYLES)}")
        if self.mark is not None and self.mark not in STYLES:
            raise DeliberateError(f"task.mark={self.mark!r} is not one of {', '.join(STYLES)}")
        _at_least_one("task.max_new_tokens", self.max_new_tokens)
        try:
            asked = self.template.format(question="\0")
        except (KeyError, IndexError, ValueError, AttributeError):
            asked = ""
        if "\0" not in asked:
            raise DeliberateError(
                f"task.prompt={self.template!r} must hold {{question}} and no other field "
                "(write {{ and }} for braces)"
            )

    @property
    def data_sha256(self) -> str:
        """Hash of the problems, whatever their order."""
        return data_fingerprint(sorted(self.problems, key=lambda problem: problem.id))

    def grade(self, problem: Problem, texts: Sequence[str], pool: GraderPool) -> list[Grade]:
        """Grades of several answers to one problem; equal texts are judged once."""
        return self._grades(problem, texts, self.style, pool)

    def verdicts(self, problem: Problem, texts: Sequence[str], pool: GraderPool) -> list[Verdict]:
        """Grades by the task's style, and correctness by its mark and by whatever is found."""
        by_style = {
            style: self._grades(problem, texts, style, pool)
            for style in dict.fromkeys((self.style, self.mark or self.style, FLEXIBLE))
        }
        strict, flexible = by_style[self.mark or self.style], by_style[FLEXIBLE]
        return [
            Verdict(grade, strict[place].correct, flexible[place].correct)
            for place, grade in enumerate(by_style[self.style])
        ]

    def _grades(
        self, problem: Problem, texts: Sequence[str], style: Style, pool: GraderPool
    ) -> list[Grade]:
        distinct = list(dict.fromkeys(texts))
        if self.own_score:
            grades = pool.score_many([(problem, text, style) for text in distinct])
        else:
            grades = pool.grade_many([(text, problem.answer, style) for text in distinct])
        table = dict(zip(distinct, grades, strict=True))
        return [table[text] for text in texts]


def task_names() -> list[str]:
    """Names that `task=` takes."""
    root = resources.files("deliberate.configs") / "task"
    return sorted(e.name.removesuffix(".yaml") for e in root.iterdir() if e.name.endswith(".yaml"))


def evaluation_config(overrides: Sequence[str]) -> DictConfig:
    """The resolved configuration of `deliberate eval`.

    Raises:
        DeliberateError: an unknown task or key.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "task" and value not in task_names():
            refuse_training_set(value)
            raise DeliberateError(f"task {value!r} is unknown: one of {', '.join(task_names())}")
    return compose("eval", overrides, verbatim=(*VERBATIM, "calibration"))


def demo_config(problems: int, out: str) -> DictConfig:
    """The bundled model on fresh word problems, all modes, by the fastest executor there is."""
    _at_least_one("problems", problems)
    cfg = compose("eval", ["task=words", f"task.size={problems}", "device=cpu"])
    cfg.out = out
    return cfg


def build_task(
    cfg: Mapping[str, Any],
    *,
    seed: int = 0,
    limit: int | None = None,
    data_dir: str | None = None,
    hub: str | None = None,
    excluded: Callable[[str], bool] | None = None,
    model: str | None = None,
) -> Task:
    """The task of a `configs/task` entry.

    Fixed sets are shuffled by `seed`, so that the first problems are a fair sample of a file that
    is sorted by subject; `limit` keeps the first so many. Questions that are `excluded` are passed
    over: a generator draws others in their place, a fixed set is shorter by them. Where the entry
    leaves the style open, the `model`'s checkpoint decides it (`answer_style`).

    Raises:
        DeliberateError: an unknown or training-only source, an impossible size, missing data.
    """
    if limit is not None:
        _at_least_one("limit", limit)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DeliberateError(f"seed={seed!r} must be a whole number")
    source = str(cfg["source"])
    refuse_training_set(source)
    own_score = source == "gym"
    if source in FIXED:
        split = str(cfg["split"])
        problems = load_problems(source, split, data_dir=data_dir, hub=hub)
        random.Random(f"order:{seed}").shuffle(problems)
        problems = [p for p in problems if excluded is None or not excluded(p.question)][:limit]
    elif source == "words":
        split = "test"
        size = _at_least_one("task.size", cfg["size"])
        drawn = _words(cfg, size if excluded is None else 2 * size + 1000, seed)
        kept = (p for p in drawn if excluded is None or not excluded(p.question))
        problems = list(islice(kept, min(size, limit or size)))
    elif own_score:
        split = "test"
        size = _at_least_one("task.size", cfg["size"])
        if cfg["dataset"] is None:
            raise DeliberateError("task.dataset has no value: name a reasoning-gym data set")
        wanted, params = min(size, limit or size), cfg["params"] or {}
        problems = _gym(str(cfg["dataset"]), wanted, seed, params, excluded)
    else:
        known = ", ".join((*FIXED, "words", "gym"))
        raise DeliberateError(f"task.source={source!r} is not one of {known}")
    mark: Any = cfg.get("mark") or "gsm8k"
    return Task(
        name=str(cfg["name"]),
        split=split,
        problems=tuple(problems),
        template=str(cfg["prompt"]),
        style=answer_style(cfg["style"], mark, model),
        max_new_tokens=cfg["max_new_tokens"],
        own_score=own_score,
        mark=mark,
    )


def refuse_training_set(name: str) -> None:
    """Raises for a set that has a train split only and is trained on."""
    if name in TRAIN_ONLY:
        raise DeliberateError(
            f"task {name!r} is refused: it has a train split only, and models train on it"
        )


def _words(cfg: Mapping[str, Any], size: int, seed: int) -> Iterator[Problem]:
    steps = list(cfg["steps"])
    if len(steps) != 2 or not all(isinstance(s, int) for s in steps):
        raise DeliberateError(f"task.steps={steps} must be two whole numbers, [least, most]")
    low, high = steps
    if not MIN_STEPS <= low <= high <= MAX_STEPS:
        raise DeliberateError(f"task.steps={steps} must rise within {MIN_STEPS}..{MAX_STEPS}")
    return word_problems("test", size=size, seed=seed, steps=(low, high))


def _gym(
    name: str,
    size: int,
    seed: int,
    params: Mapping[str, Any],
    excluded: Callable[[str], bool] | None = None,
) -> list[Problem]:
    """Distinct problems of the test side of a reasoning-gym set."""
    if not 0 <= seed < GYM_SEEDS:
        raise DeliberateError(
            f"seed={seed} must be in 0..{GYM_SEEDS - 1} for a reasoning-gym task: the ranges of "
            "other seeds may meet those of training"
        )
    found: dict[str, Problem] = {}
    start, end = seed * _GYM_STRIDE, (seed + 1) * _GYM_STRIDE
    # Nothing trains on the evaluation-only sets, so all of their problems will do.
    every = name in EVALUATION_ONLY
    while start < end:
        block = min(end - start, max(16, (size - len(found)) * (1 if every else 9)))
        for problem in load_reasoning_gym(name, size=block, seed=start, **params):
            if excluded is not None and excluded(problem.question):
                continue
            if every or split_of(problem.question) == "test":
                found.setdefault(problem.question, problem)
        if len(found) >= size:
            return list(found.values())[:size]
        start += block
        if start - seed * _GYM_STRIDE > 64 * size + 1024:
            break
    raise DeliberateError(
        f"reasoning_gym/{name} gives only {len(found)} distinct test problems: lower task.size="
        f"{size}, or change task.params"
    )


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DeliberateError(f"{name}={value} must be a whole number of at least 1")
    return value
