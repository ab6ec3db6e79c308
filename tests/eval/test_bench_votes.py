"""`deliberate bench votes`: greedy, fixed and adaptive votes on the same problems and seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.benchmarks.votes import vote_rule
from deliberate.reasoning.votes import AdaptiveConsistency
from deliberate.utils.errors import DeliberateError

SMALL = ["task=words", "task.size=3", "task.steps=[1,1]", "task.max_new_tokens=24", "limit=null"]
SMALL += ["executor=generic", "samples=4", "batch=4", "answer_tokens=4"]
SMALL += ["rules=[{adaptive: {most: 4, at_a_time: 2}}, {confidence: {most: 4, warm_up: 2}}]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_variants_are_compared_on_the_same_problems(checkpoint, tmp_path, capsys):
    out = tmp_path / "votes.json"
    run_benchmark(["votes", f"model={checkpoint}", f"out={out}", *SMALL])
    text = capsys.readouterr().out
    assert "against greedy" in text and "2 problems" in text
    variants = json.loads(out.read_text())["variants"]
    assert list(variants) == ["greedy", "fixed 4", "adaptive", "confidence"]
    assert variants["greedy"]["samples"] == [1, 1] and variants["fixed 4"]["samples"] == [4, 4]
    for one in variants.values():
        assert len(one["right"]) == 2 and all(seconds > 0 for seconds in one["seconds"])
    assert max(variants["adaptive"]["samples"]) <= 4


def test_a_rule_is_its_name_and_its_settings():
    name, rule = vote_rule({"adaptive": {"most": 8}})
    assert name == "adaptive" and rule == AdaptiveConsistency(most=8)
    for given, words in [
        ({"adaptive": {"best": 8}}, "adaptive has the settings probability, most, at_a_time"),
        ({"adaptve": None}, "rules=adaptve is not one of fixed, adaptive"),
        ({"adaptive": None, "fixed": None}, "must be one"),
    ]:
        with pytest.raises(DeliberateError, match=words):
            vote_rule(given)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("samples=1", "samples=1"),
        ("warmup=3", "warmup=3 of 3 problems"),
        ("rules=5", "rules=5 must be a list"),
        ("rules={adaptive: {most: 4}}", "rules={adaptive: {most: 4}} must be a list"),
        ("rules=[adaptive]", "rules: 'adaptive' must be one {rule: settings}"),
    ],
)
def test_settings_that_cannot_work_are_refused(checkpoint, override, words):
    with pytest.raises(DeliberateError, match=words):
        run_benchmark(["votes", f"model={checkpoint}", *SMALL, override])


def test_answers_of_the_bundled_model_are_graded(tmp_path):
    out = tmp_path / "votes.json"
    easy = ["task=words", "task.size=3", "task.steps=[1,1]", "limit=null", "samples=2", "rules=[]"]
    run_benchmark(["votes", "model=tiny", f"out={out}", *easy])
    variants = json.loads(out.read_text())["variants"]
    assert variants["greedy"]["right"] == [True, True]
    assert variants["fixed 2"]["right"] == [True, True]
