"""A task is one YAML: it names a reader, and needs no change of code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deliberate.data.problem import Problem
from deliberate.eval.calibrate.command import calibration_config, calibration_task
from deliberate.eval.tasks.readers import ReadRequest
from deliberate.eval.tasks.registry import command_task, evaluation_config, task_names
from deliberate.eval.tasks.task import Task
from deliberate.utils.errors import DeliberateError

YAML = """\
name: riddles
reader: json_lines
path: riddles.{split}.jsonl
split: test
columns: {question: riddle, answer: reply, difficulty: level}
calibration: {split: train}
prompt: "Riddle: {question}"
style: auto
mark: gsm8k
max_new_tokens: 12
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "riddles.yaml").write_text(YAML)
    for split in ("test", "train"):
        rows = [
            {"riddle": f"{split} {i}?", "reply": f"so\n#### {i}", "level": i % 3}
            for i in range(1, 31)
        ]
        (tmp_path / f"riddles.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def task(folder: Path, *overrides: str) -> Task:
    return command_task(evaluation_config([f"task_dir={folder}", "task=riddles", *overrides]))


def test_a_yaml_in_a_folder_adds_a_task(folder):
    assert "riddles" in task_names(folder) and "riddles" not in task_names()
    made = task(folder, "limit=20", "task.max_new_tokens=9")
    assert (made.name, made.split, len(made.problems), made.max_new_tokens) == (
        "riddles", "test", 20, 9,
    )  # fmt: skip
    assert all(problem.question == f"test {problem.answer}?" for problem in made.problems)
    assert {problem.difficulty for problem in made.problems} == {0, 1, 2}
    other = task(folder, "limit=20", "seed=1")
    assert made.problems != other.problems
    assert made.problems[0].solution == f"so\n#### {made.problems[0].answer}"


def test_calibrate_reads_what_the_task_says_instead(folder):
    cfg = calibration_config([f"task_dir={folder}", "task=riddles", "size=7"])
    made = calibration_task(cfg)
    assert made.split == "train" and len(made.problems) == 7
    assert all(problem.question.startswith("train ") for problem in made.problems)


def test_the_data_folder_holds_files_of_tasks_too(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (folder / "riddles.test.jsonl").rename(tmp_path / "data" / "riddles.test.jsonl")
    assert len(task(folder, f"data.dir={tmp_path / 'data'}").problems) == 30


def read(settings, request: ReadRequest):
    for i in range(5):
        yield Problem(id=str(i), question=f"{settings['name']} {i}?", answer=str(i))


def test_a_function_of_any_module_is_a_reader(folder):
    made = task(folder, f"task.reader={__name__}.read", "limit=3")
    assert [problem.question for problem in made.problems] == [f"riddles {i}?" for i in range(3)]
    task(folder, f"task.reader={__name__}.read", "+task.own=1")  # it may read any setting


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["task.columns.answer=nix"], "task.columns.answer to one of riddle, reply, level"),
        (["+task.columns.nix=riddle"], "'nix' is not one of question"),
        (["task.path=nix.jsonl"], "there is no file"),
        (["task.path=null"], "task.path has no value"),
        (["+task.pth=x"], "task.pth is read by nothing: the settings of task 'riddles' are cal"),
        (["+task.steps=[1, 2]"], "task.steps is read by nothing"),
    ],
)
def test_a_mistake_in_the_yaml_is_named(folder, overrides, named):
    with pytest.raises(DeliberateError, match=named):
        task(folder, *overrides)


def test_a_folder_must_exist_and_its_tasks_have_names_of_their_own(folder):
    with pytest.raises(DeliberateError, match="is no folder"):
        task_names(folder / "nix")
    (folder / "gsm8k.yaml").write_text(YAML)
    with pytest.raises(DeliberateError, match=r"gsm8k\.yaml has the name of a built-in task"):
        task(folder)
