from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from random_checkpoint import CONTEXT, save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.data.problem import Problem
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.runner import command
from deliberate.eval.runner.results import PARTIAL_FILE, read_results
from deliberate.eval.runner.runner import Runner, RunSettings
from deliberate.eval.tasks.registry import build_task, evaluation_config
from deliberate.utils.errors import DeliberateError

MODES = ("dense", "exact", "threshold")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(checkpoint: Path, out: Path, *overrides: str):
    given = ["task.size=7", "task.max_new_tokens=20", "device=cpu", *overrides]
    cfg = evaluation_config(given)
    return OmegaConf.merge(cfg, {"model": str(checkpoint), "out": str(out)})


def test_several_at_a_time_give_the_answers_of_one_at_a_time(checkpoint) -> None:
    cfg = evaluation_config(["task.size=7", "task.max_new_tokens=20"])
    task, model = build_task(cfg.task), AdaptiveModel.from_pretrained(checkpoint)
    tokenizer, found = load_tokenizer(checkpoint), {}
    with GraderPool(1) as pool:
        for running in (None, 1, 3):
            settings = RunSettings(modes=MODES, max_running=running)
            records = list(Runner(model, tokenizer, task, settings).records(pool))
            found[running] = {record.id: record.modes for record in records}
    assert set(found[3]) == {problem.id for problem in task.problems}
    for name, alone in found[None].items():
        for running in (1, 3):
            for mode in MODES:
                own = found[running][name][mode]
                assert own.tokens == alone[mode].tokens, (running, mode)
                assert own.correct == alone[mode].correct and own.finish == alone[mode].finish
                assert 0 < own.prefill_seconds <= own.seconds


def test_a_prompt_without_room_is_wrong_in_every_mode(checkpoint) -> None:
    task = build_task(evaluation_config(["task.size=2"]).task)
    long = Problem(id="long", question="apples " * CONTEXT, answer="1", difficulty=1)
    mixed = dataclasses.replace(task, problems=(task.problems[0], long), max_new_tokens=8)
    settings = RunSettings(modes=("dense", "exact"), max_running=2)
    model = AdaptiveModel.from_pretrained(checkpoint)
    with GraderPool(1) as pool:
        runner = Runner(model, load_tokenizer(checkpoint), mixed, settings)
        found = {record.id: record.modes for record in runner.records(pool)}
    assert [outcome.tokens for outcome in found["long"].values()] == [[], []]
    assert all(outcome.tokens for outcome in found[task.problems[0].id].values())


def test_a_stopped_run_goes_on_and_its_report_says_what_a_time_is(
    checkpoint, tmp_path, monkeypatch
) -> None:
    cfg = run(checkpoint, tmp_path, "modes=[dense,exact]", "max_running=2", "warmup=0")
    grade, graded = Runner._record, []

    def stop_at_the_fourth(self, index, done, pool):
        if len(graded) == 3:
            raise KeyboardInterrupt
        graded.append(index)
        return grade(self, index, done, pool)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_record", stop_at_the_fourth)
        with pytest.raises(command.Interrupted, match="3 of 7 problems"):
            command.evaluate(cfg, progress=False)
    assert (tmp_path / PARTIAL_FILE).is_file()
    done = command.evaluate(cfg, progress=False)
    result, records = read_results(tmp_path)
    whole = command.evaluate(OmegaConf.merge(cfg, {"out": str(tmp_path / "whole")}), progress=False)
    assert [r.id for r in records] == [r.id for r in read_results(whole.report.parent)[1]]
    assert result.modes["exact"].versus_dense.identical == 7 and not done.broken
    assert any("2 problems at a time" in note for note in result.notes)
    assert any("3 problems from" in note for note in result.notes)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_running": 0}, "max_running=0 must be a whole number"),
        ({"max_running": 2}, "max_running=2 with mode 'transformers'"),
        ({"max_running": 2, "modes": ("exact",), "strict": True}, "with strict=True"),
    ],
)
def test_what_cannot_be_decoded_together_is_refused_by_name(settings, named) -> None:
    with pytest.raises(DeliberateError, match=named):
        RunSettings(**settings)
