"""`deliberate bench precision`: plans are applied, fit their budget, and are compared honestly."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.precision import _base, _fused, sensitivities
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.benchmarks.teacher_forced import (
    Read,
    agreement,
    compared,
    every_state,
    read,
    read_from,
)
from deliberate.executors.quantization import Storage, WeightPlan
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError


def test_a_plan_fits_its_budget_and_float_is_compared_with_itself(tmp_path):
    folder, out = save_checkpoint(tmp_path / "model"), tmp_path / "out.json"
    common = [f"model={folder}", "limit=4", "task.size=4", "rounds=8", f"out={out}"]
    storages = ["storages=[native,int4]", "budgets=[0.5]", f"others=[{folder}]"]
    run_benchmark(["precision", *common, *storages])
    found = json.loads(out.read_text())
    rows = found["rows"]
    mixed = found["plans"]["mixed 0.5"]
    assert set(mixed) <= {"native", "int4"} and len(mixed) == len(found["losses"])
    assert rows["mixed 0.5"]["bytes"] <= 0.5 * rows["native"]["bytes"]
    assert rows["int4"]["bytes"] < rows["mixed 0.5"]["bytes"] or "native" not in mixed
    for same in ("native", f"{folder} native"):
        assert rows[same]["agreement"] == 1 and rows[same]["nll_change"] == 0
    assert rows["int4"]["nll_change"] != 0
    assert rows["int4"]["nll"] == rows[f"{folder} int4"]["nll"]
    for name in ("native", "int4"):
        small = rows[f"{name}, keys and values int8"]
        assert 0 < small["agreement"] <= 1 and small["ms"] > 0
        assert small["nll"] != rows[name]["nll"] and small["bytes"] == rows[name]["bytes"]
        assert small["cache_bytes"] == (8 + 4) / 32 * rows[name]["cache_bytes"]
    assert "mixed 0.5, keys and values int8" not in rows or len(set(mixed[:-1])) == 1
    with pytest.raises(DeliberateError, match="native first, then smaller"):
        run_benchmark(["precision", f"model={folder}", "storages=[int4]"])


def test_a_layer_that_rounding_leaves_as_it_is_loses_nothing(tmp_path):
    base = _base(str(save_checkpoint(tmp_path / "model")))
    texts = [Example(list(range(5, 17)), list(range(20, 40)))] * 2
    every = [Storage.NATIVE, Storage.INT4]
    with torch.no_grad():
        for linear in base.model.layers[1].modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.zero_()  # 4 bits hold this exactly
    sizes, losses = sensitivities(base, every, texts)
    assert losses[1]["int4"] == 0 and losses[0]["int4"] > 0.1
    assert all(own["native"] == 0 for own in losses)
    assert all(own["int4"] < own["native"] for own in sizes)


def test_what_is_read_is_the_models_own_likelihood(tmp_path):
    base = _base(str(save_checkpoint(tmp_path / "model")))
    text = Example([5, 6, 7], [8, 9])
    found = read(Backbone(base), [text])
    logits = base(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4].log_softmax(-1)
    assert found.nll[0] == pytest.approx(-float((logits[0, 8] + logits[1, 9]) / 2), abs=1e-5)
    target = torch.tensor([1, 2]), torch.tensor([3, 3])
    other = _read([1.0, 3.0], [[1, 2], [3, 1]], target)
    own = _read([2.0, 3.0], [[1, 1], [3, 3]], target)
    assert agreement(own, other) == 0.5
    row = compared(own, other, 8)
    assert (row.right, row.lost, row.gained, row.nll_change) == (1, 1, 1, 0.5)
    assert row.tokens_right == 0.75 and row.tokens_change == 0
    assert row.tokens_interval == (-0.5, 0.5) and row.right_interval[0] < 0 < row.right_interval[1]


def _read(nll, choices, target) -> Read:
    made = [torch.tensor(one) for one in choices]
    return Read(nll, made, [one == wanted for one, wanted in zip(made, target, strict=True)])


def test_layers_below_a_unit_need_not_be_run_again(tmp_path):
    base = _base(str(save_checkpoint(tmp_path / "model")))
    texts = [Example(list(range(5, 17)), list(range(20, 40))), Example([7, 8, 9], [30, 4])]
    depth = len(base.model.layers)
    plain = _fused(base, WeightPlan.build(depth))
    states = [every_state(plain, text) for text in texts]
    for unit in (0, 2, depth - 1):
        plan = WeightPlan.build(depth, {"int4": [unit]})
        small = _fused(base, plan)
        whole, part = read(small, texts), read_from(small, texts, [s[unit] for s in states], unit)
        assert part.nll == whole.nll
        assert all(map(torch.equal, part.choices, whole.choices))


def test_a_rotated_model_is_compared_with_itself(tmp_path):
    folder, out = save_checkpoint(tmp_path / "model"), tmp_path / "out.json"
    common = [f"model={folder}", "limit=5", "search=2", "task.size=5", "rounds=8", f"out={out}"]
    few = ["storages=[native,int4]", "budgets=[0.5]", "kv=false"]
    changes = {}
    for rotate in (False, True):
        run_benchmark(["precision", *common, *few, f"rotate={rotate}"])
        found = json.loads(out.read_text())
        assert found["texts"] == {"sensitivities": 2, "figures": 3} and found["rotated"] is rotate
        changes[rotate] = [found["rows"][name]["nll"] for name in ("native", "int4")]
    assert changes[True][0] == pytest.approx(changes[False][0], abs=1e-4)
    assert abs(changes[True][1] - changes[False][1]) > 1e-3
    with pytest.raises(DeliberateError, match="5 texts, 4 of them for sensitivities: at least 2"):
        run_benchmark(["precision", *common, *few, "search=4"])
    run_benchmark(["precision", *common, *few, "budgets=[]"])
    found = json.loads(out.read_text())
    assert list(found["rows"]) == ["native", "int4"] and found["losses"] == []
    assert found["texts"] == {"sensitivities": 0, "figures": 5}
