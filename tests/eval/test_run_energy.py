"""The energy of an answer goes from the machine's counters to the summary of its mode."""

from __future__ import annotations

import itertools

import pytest
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.eval.grading.graders import GraderPool
from deliberate.eval.runner.runner import Runner, RunSettings
from deliberate.eval.runner.summary import summarise
from deliberate.eval.tasks.registry import build_task, evaluation_config


def test_joules_are_counted_around_each_answer_and_summed_over_its_tokens(tmp_path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint")
    model, tokenizer = AdaptiveModel.from_pretrained(folder), load_tokenizer(folder)
    task = build_task(evaluation_config(["task.size=2", "task.max_new_tokens=8"]).task)
    runner = Runner(model, tokenizer, task, RunSettings(modes=("dense", "threshold"), warmup=0))
    readings = itertools.count(100.0, 4.0)  # each answer reads twice: 4 joules an answer
    runner.energy.joules = lambda: next(readings)
    with GraderPool(1) as pool:
        records = list(runner.records(pool))
    for mode, summary in summarise(records, num_layers=model.backbone.num_layers).items():
        assert [record.modes[mode].joules for record in records] == [4.0, 4.0]
        assert summary.joules_per_token == pytest.approx(8.0 / summary.tokens)


def test_where_nothing_is_counted_nothing_is_stated(tmp_path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint")
    model, tokenizer = AdaptiveModel.from_pretrained(folder), load_tokenizer(folder)
    task = build_task(evaluation_config(["task.size=1", "task.max_new_tokens=4"]).task)
    runner = Runner(model, tokenizer, task, RunSettings(modes=("dense",), warmup=0))
    runner.energy.joules = lambda: None
    with GraderPool(1) as pool:
        found = summarise(list(runner.records(pool)), num_layers=model.backbone.num_layers)
    assert found["dense"].joules_per_token is None
