"""A task: problems, the prompt they are put in, and how the answers are graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deliberate.data.problem import Problem
from deliberate.data.sources import data_fingerprint
from deliberate.eval.grading.answers import STYLES, Style
from deliberate.eval.grading.graders import Grade, GraderPool
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError

FLEXIBLE: Style = "auto"


@dataclass(frozen=True)
class Verdict:
    """The grade of one answer, and whether it is correct by the strict and the flexible filter.

    Attributes:
        grade: by the task's style: what accuracies count.
        strict: the answer behind the task's mark is correct.
        flexible: the answer is correct, wherever in the text it is found.
    """

    grade: Grade
    strict: bool
    flexible: bool


@dataclass(frozen=True)
class Task:
    """Problems, the prompt they are put in, and how answers to them are graded.

    Attributes:
        problems: in the order in which they are run.
        template: the prompt, with ``{question}``.
        style: where the final answer is found in a text (see `extract_answer`); decides what counts
            as correct.
        mark: style of the strict accuracy: only an answer behind this mark counts. None: `style`.
        max_new_tokens: the length limit of an answer, in tokens.
        own_score: graded by the data set's own scorer (reasoning-gym); correct = a score of 1.
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
        at_least("task.max_new_tokens", self.max_new_tokens, 1)
        try:
            prompt = self.template.format(question="\0")
        except (KeyError, IndexError, ValueError, AttributeError):
            prompt = ""
        if "\0" not in prompt:
            raise DeliberateError(
                f"task.prompt={self.template!r} must hold {{question}} and no other field "
                "(write {{ and }} for braces)"
            )

    @property
    def data_sha256(self) -> str:
        """Hash of the problems, whatever their order."""
        return data_fingerprint(sorted(self.problems, key=lambda problem: problem.id))

    def grade(self, problem: Problem, texts: Sequence[str], pool: GraderPool) -> list[Grade]:
        """Grades of several answers to one problem; equal texts are graded once."""
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
