"""`deliberate bench subset`: layers that do nothing are dropped first, and gains are bounded."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint
from tiny_models import tiny_model

from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.benchmarks.subset import best, checked, choices, same, search
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

TEXTS = [Example(list(range(5, 12)), list(range(20, 40)))] * 2


def test_a_layer_that_does_nothing_is_dropped_first():
    base = tiny_model("llama", layers=4)
    with torch.no_grad():  # both add nothing to the residual stream
        base.model.layers[1].mlp.down_proj.weight.zero_()
        base.model.layers[1].self_attn.o_proj.weight.zero_()
    backbone = Backbone(base)
    path = search(backbone, TEXTS)
    assert path[0] == (1, 3, 4) and [len(one) for one in path] == [3, 2, 1]
    every = choices(backbone, (1, 2, 3, 4), TEXTS)
    assert same(choices(backbone, path[0], TEXTS), every) == 1
    assert same(choices(backbone, path[-1], TEXTS), every) < 1
    logits = base(torch.tensor([TEXTS[0].prompt + TEXTS[0].answer])).logits[0, 6:-1]
    assert torch.equal(every[0], logits.argmax(-1))


def test_the_best_number_of_drafts_follows_from_acceptance_and_costs():
    assert best(1.0, 0.0, 0.0, 6) == (6, 7.0)  # drafts for nothing that are always accepted
    count, speed = best(0.0, 0.5, 0.1, 6)
    assert count == 1 and speed == pytest.approx(1 / 1.6)
    assert best(0.9, 0.5, 0.05, 6)[1] > best(0.8, 0.5, 0.05, 6)[1]
    assert best(0.9, 0.9, 0.1, 6)[1] < 1  # a draft that costs a pass does not pay


def test_the_command_writes_every_subset(tmp_path):
    folder, out = save_checkpoint(tmp_path / "model"), tmp_path / "out.json"
    run_benchmark(["subset", f"model={folder}", "limit=4", "task.size=4", "rounds=4", f"out={out}"])
    found = json.loads(out.read_text())
    assert [len(one["layers"]) for one in found["subsets"]] == [3, 2, 1]
    assert all(0 <= one["agreement"] <= 1 and one["speed"] > 0 for one in found["subsets"])
    costs = [one["cost"] for one in found["subsets"]]
    assert costs == sorted(costs, reverse=True) and found["times"]["layers"] > 0


def test_given_subsets_are_judged_without_a_search(tmp_path):
    folder, out = save_checkpoint(tmp_path / "model"), tmp_path / "out.json"
    common = [f"model={folder}", "limit=4", "task.size=4", "rounds=4", f"out={out}"]
    run_benchmark(["subset", *common, "subsets=[[1,3],[2]]"])
    found = json.loads(out.read_text())
    assert [one["layers"] for one in found["subsets"]] == [[1, 3], [2]]


@pytest.mark.parametrize("wrong", [[[2, 1]], [[0, 1]], [[5]], [[1, 1]], [[]], [3], [["1"]], []])
def test_a_subset_that_is_none_is_refused_by_name(wrong):
    with pytest.raises(DeliberateError, match=r"subsets.*(give|search)"):
        checked(wrong, 4)
    assert checked([[1, 4]], 4) == [(1, 4)]
