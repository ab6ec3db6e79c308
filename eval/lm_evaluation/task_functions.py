"""What the task files of `tasks/` call: our data sets, and our grader in place of a regex."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from deliberate.data.sources import load_problems
from deliberate.eval.grading.graders import GraderPool, Style

_pool = GraderPool(processes=1)


def data_set(*, source: str, split: str, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """A data set of ``$DELIBERATE_DATA`` with the columns question and answer, as split ``test``.

    Raises:
        DeliberateError: no folder of data sets, or none of this name in it.
    """
    problems = load_problems(source, split, data_dir=data_dir)
    rows = {
        "question": [problem.question for problem in problems],
        "answer": [problem.answer for problem in problems],
    }
    return DatasetDict({"test": Dataset.from_dict(rows)})


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer in the text equals the reference, by our grader, whatever its mark."""
    return {"exact_match": _correct(results[0], doc["answer"], "auto")}


def _correct(text: str, reference: str, style: Style) -> float:
    (grade,) = _pool.grade_many([(text, reference, style)])
    return float(grade.correct)
