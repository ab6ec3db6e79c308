"""Problems of an evaluation are none of those that the model's calibration was made from."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
from tiny_calibration import tiny_calibration
from tiny_models import tiny_model

from deliberate.api.checkpoint import resolve
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.eval.tasks.calibration_overlap import (
    calibration_questions,
    question_key,
    question_keys,
    set_apart,
)
from deliberate.eval.tasks.registry import build_task, evaluation_config


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return tiny_calibration(AdaptiveModel(tiny_model("llama"), [1, 2]))


def made_from(calibration: Calibration, *questions: str) -> Calibration:
    keys = [question_key(question) for question in questions]
    return replace(calibration, meta={"recorded": {"questions": keys}})


def rebuilt(task: object, **settings):
    build = partial(build_task, task, **settings)
    return build(), lambda excluded: build(excluded=excluded)


@pytest.mark.parametrize("name", ["tiny", "tiny-gate"])
def test_the_readmes_evaluation_holds_no_problem_of_the_bundled_calibration(name) -> None:
    bundled = Calibration.load(resolve(name))
    requested = calibration_questions(bundled)
    assert requested is not None and len(requested) == 3000
    cfg = evaluation_config(["task.size=1002"])
    task, rebuild = rebuilt(cfg.task)
    assert len(requested & set(question_keys(task.problems))) == 2, "seeds alone do not do it"
    apart, notes = set_apart(task, bundled, rebuild)
    assert not requested & set(question_keys(apart.problems))
    assert len({p.question for p in apart.problems}) == 1002
    assert notes == ["2 problems that the calibration was made from were replaced"]
    kept = [p for p in task.problems if question_key(p.question) not in requested]
    assert list(apart.problems[: len(kept)]) == kept, "the others are as they were"


def test_a_fixed_set_is_shorter_by_what_the_calibration_has_seen(calibration, tmp_path) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(5)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = evaluation_config(["task=gsm8k"])
    task, rebuild = rebuilt(cfg.task, data_dir=str(tmp_path), limit=4)
    first = task.problems[0].question
    seen = made_from(calibration, f"  {first.upper()}\n")
    apart, notes = set_apart(task, seen, rebuild)
    assert first not in {p.question for p in apart.problems} and len(apart.problems) == 4
    task, rebuild = rebuilt(cfg.task, data_dir=str(tmp_path))
    apart, notes = set_apart(task, seen, rebuild)
    assert len(apart.problems) == 4 and notes[0].endswith("were left out")


def test_a_generated_set_draws_others_in_their_place(calibration) -> None:
    cfg = evaluation_config(["task=chain_sum", "task.size=20"])
    task, rebuild = rebuilt(cfg.task)
    gone = [p.question for p in task.problems[:3]]
    apart, _ = set_apart(task, made_from(calibration, *gone), rebuild)
    assert len(apart.problems) == 20 and not {p.question for p in apart.problems} & set(gone)


def test_a_calibration_that_does_not_say_what_it_was_made_from_gets_a_note(calibration) -> None:
    task, rebuild = rebuilt(evaluation_config(["task.size=6"]).task)
    same, notes = set_apart(task, replace(calibration, meta={}), rebuild)
    assert same is task and "does not say which problems" in notes[0]
    assert set_apart(task, None, rebuild) == (task, [])
