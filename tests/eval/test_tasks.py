from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from random_checkpoint import save_checkpoint

from deliberate.api.model import AdaptiveModel
from deliberate.data.chains import AnswerPoint
from deliberate.data.problem import ANSWER_MARK, Problem
from deliberate.data.word_problems import split_of
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.tasks.registry import build_task, evaluation_config, task_names
from deliberate.eval.tasks.task import Task
from deliberate.train.setup import note_answer_mark
from deliberate.utils.errors import DeliberateError


def task(*overrides: str, model: str | None = None) -> Task:
    cfg = evaluation_config(list(overrides))
    return build_task(
        cfg.task,
        seed=cfg.seed,
        limit=cfg.limit,
        data_dir=cfg.data.dir,
        hub=cfg.data.hub,
        model=model,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A MATH file sorted by subject, as the published one is."""
    (tmp_path / "math").mkdir()
    rows = [
        {
            "id": f"m{i}",
            "problem": f"What is {i}+1?",
            "solution": f"\\boxed{{{i + 1}}}",
            "level": f"Level {i % 5 + 1}",
            "type": "Algebra" if i < 50 else "Geometry",
        }
        for i in range(100)
    ]
    (tmp_path / "math" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_every_task_file_composes_and_names_its_source() -> None:
    assert {"words", "gsm8k", "math", "math500", "chain_sum", "gsm_symbolic", "gym"} <= set(
        task_names()
    )
    for name in task_names():
        cfg = evaluation_config([f"task={name}"])
        assert "{question}" in cfg.task.prompt and cfg.task.max_new_tokens > 0


def test_chains_are_word_problems_whose_solutions_are_chains() -> None:
    drawn = build_task(evaluation_config(["task=chains", "task.size=24"]).task).problems
    assert Counter(p.difficulty for p in drawn) == dict.fromkeys(range(1, 7), 4)
    assert {split_of(p.question) for p in drawn} == {"test"}
    assert all(AnswerPoint.of(p).determined_at < len(p.solution) for p in drawn)


def test_word_problems_are_the_test_side_with_steps_evenly_mixed() -> None:
    drawn = task("task.size=60").problems
    assert Counter(p.difficulty for p in drawn) == dict.fromkeys(range(1, 7), 10)
    assert {split_of(p.question) for p in drawn} == {"test"}
    assert [p.id for p in task("task.size=60", "limit=12").problems] == [p.id for p in drawn[:12]]
    assert {p.id for p in task("task.size=60", "seed=1").problems} != {p.id for p in drawn}


def test_chain_sum_is_the_test_side_without_repeats_and_has_operations_as_difficulty() -> None:
    drawn = task("task=chain_sum", "limit=40").problems
    assert len({p.question for p in drawn}) == 40
    assert {split_of(p.question) for p in drawn} == {"test"}
    assert all(p.difficulty == p.solution.count("\n") for p in drawn)
    assert not {p.question for p in drawn} & {
        p.question for p in task("task=chain_sum", "limit=40", "seed=1").problems
    }


def test_a_limit_on_a_sorted_file_is_a_fair_sample_and_the_hash_ignores_the_order(data) -> None:
    short = task("task=math", f"data.dir={data}", "limit=30")
    assert min(Counter(p.subject for p in short.problems).values()) >= 8
    assert {p.difficulty for p in short.problems} == {1, 2, 3, 4, 5}
    longer = task("task=math", f"data.dir={data}", "limit=40")
    assert longer.problems[:30] == short.problems
    whole, other = (task("task=math", f"data.dir={data}", f"seed={s}") for s in (0, 1))
    assert whole.problems != other.problems and whole.data_sha256 == other.data_sha256
    assert whole.data_sha256 != longer.data_sha256


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["task=nix"], "task 'nix' is unknown"),
        (["task=gsm8k", "task.source=nix"], "task.source='nix'"),
        (["task.reader=nix"], "task.reader='nix' is unknown"),
        (["task.reader=json.nix"], "task.reader='json.nix' cannot be imported"),
        (["task=gsm8k", "data.dir=/nowhere"], "'/nowhere' does not exist"),
        (["limit=0"], "limit=0"),
        (["task.size=0"], "task.size=0"),
        (["task.steps=[0,9]"], r"task.steps=\[0, 9\]"),
        (["task.prompt=Answer"], "task.prompt='Answer'"),
        (["'task.prompt=\"{question} {x}\"'"], "."),
        (["task.style=nix"], "task.style='nix'"),
        (["task.max_new_tokens=0"], "task.max_new_tokens=0"),
        (["task=gym"], "task.dataset has no value"),
        (["task=gym", "task.dataset=chain_sumo"], "did you mean chain_sum"),
        (["task=chain_sum", "seed=60"], r"seed=60 must be in 0\.\.59"),
        (["task=chain_sum", "+task.params.max_terms=2", "+task.params.max_digits=1"], "distinct"),
        (["model="], "model is empty"),
        (["limits=3"], "did you mean limit"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(overrides: list[str], named: str) -> None:
    with pytest.raises(DeliberateError, match=named) as caught:
        task(*overrides)
    assert "\n" not in str(caught.value)


def test_paths_and_model_names_are_taken_as_they_are() -> None:
    cfg = evaluation_config(["model=a b/c=d", "out=x,y [1]", "data.dir=/a:b{c}"])
    assert (cfg.model, cfg.out, cfg.data.dir) == ("a b/c=d", "x,y [1]", "/a:b{c}")


def test_answers_are_judged_by_the_tasks_own_mark_and_equal_texts_once() -> None:
    words = task("task.size=6")
    problem = words.problems[0]
    right, bare = f" so it is\n#### {problem.answer}", problem.answer
    calls = []

    class Counting(GraderPool):
        def grade_many(self, items, progress=False):
            calls.extend(items)
            return super().grade_many(items, progress)

    with Counting(1) as pool:
        grades = words.grade(problem, [right, bare, right, right], pool)
    assert [g.correct for g in grades] == [True, False, True, True]
    assert len(calls) == 2


def test_a_reasoning_gym_answer_is_extracted_and_scored_by_its_own_rule() -> None:
    chain = task("task=chain_sum", "limit=16")
    problem = chain.problems[0]
    with GraderPool(1) as pool:
        texts = [
            f" 1 + 1 = 2\n#### {problem.answer}",
            " 1 + 1 = 2\n#### 123456",
            "no mark",
            f" it is {problem.answer}",
        ]
        grades = chain.grade(problem, texts, pool)
    assert [g.correct for g in grades] == [True, False, False, False]
    assert grades[0].predicted == problem.answer and grades[2].predicted is None


def test_a_scorer_that_raises_counts_the_answer_as_wrong() -> None:
    foreign = Problem(id="x", question="q?", answer="1", source="words")
    gym = Task("t", "test", (foreign,), "{question}", "gsm8k", 4, own_score=True)
    with GraderPool(1) as pool:
        assert not gym.grade(foreign, ["#### 1"], pool)[0].correct


def test_the_mark_counts_for_models_trained_on_it_any_answer_for_others(tmp_path: Path) -> None:
    cfg = evaluation_config(["task.size=6"]).task
    stock, copy = save_checkpoint(tmp_path / "stock"), tmp_path / "copy"
    AdaptiveModel.from_pretrained("tiny").save_pretrained(copy, merge=True)
    styles = [build_task(cfg, model=str(m)).style for m in ("tiny", "tiny-gate", copy, stock)]
    assert styles == ["gsm8k", "gsm8k", "gsm8k", "auto"]
    strict = evaluation_config(["task.size=6", "task.style=gsm8k"]).task
    assert build_task(strict, model=str(stock)).style == "gsm8k"
    boxed = build_task({**cfg, "mark": "boxed"}, model="tiny")
    assert (boxed.style, boxed.mark) == ("auto", "boxed")


def test_training_on_problems_writes_the_mark_and_frozen_bases_keep_theirs() -> None:
    model = SimpleNamespace(base=SimpleNamespace(config=SimpleNamespace()))

    def after(recipe: str, **weights: float) -> str | None:
        vars(model.base.config).clear()
        cfg = {"data": {"weights": weights}, "recipe": {"name": recipe}}
        note_answer_mark(OmegaConf.create(cfg), model)
        return getattr(model.base.config, ANSWER_MARK, None)

    assert after("layerskip", gsm8k=1, math=1) == after("pretrain", words=1) == "gsm8k"
    assert after("lora", math=1, gsm8k=0) == "boxed"
    assert after("heads", gsm8k=1) is None and after("layerskip", text=1, self=1) is None
    assert after("pretrain", chains=1) == "gsm8k"
    assert model.base.config.reasoning_tags == ["<think>", "</think>"]


def test_an_answer_is_judged_strictly_and_flexibly() -> None:
    words = task("task.size=6")
    problem = words.problems[0]
    texts = [
        f"#### {problem.answer}",
        f"So the answer is {problem.answer}.",
        f"#### 1234567\nThe answer is {problem.answer}",
        "I do not know",
    ]
    with GraderPool(1) as pool:
        verdicts = words.verdicts(problem, texts, pool)
    assert [v.strict for v in verdicts] == [True, False, False, False]
    assert [v.flexible for v in verdicts] == [True, True, False, False]
    assert [v.grade.correct for v in verdicts] == [v.strict for v in verdicts]
    assert [v.grade.predicted for v in verdicts][1:] == [None, "1234567", None]


@pytest.mark.parametrize("name", ["mawps", "asdiv_a"])
def test_a_set_that_models_here_train_on_is_for_models_that_were_not(name, tmp_path) -> None:
    (tmp_path / name).mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name / "train.jsonl").write_text(text)
    stock = save_checkpoint(tmp_path / "stock")
    found = task(f"task={name}", f"data.dir={tmp_path}", model=str(stock))
    assert sorted(problem.answer for problem in found.problems) == ["1", "2", "3", "4"]
    assert found.style == "auto"
    with pytest.raises(DeliberateError, match="the model was trained on problems"):
        task(f"task={name}", f"data.dir={tmp_path}", model="tiny")
    with pytest.raises(DeliberateError, match="the model was trained on problems"):
        task("task=gsm8k", f"task.source={name}", f"data.dir={tmp_path}", model="tiny")
