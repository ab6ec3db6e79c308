"""`deliberate bench precision`: plans are applied, fit their budget, and are compared honestly."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.precision import Read, agreement, compared, read, sensitivities
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.executors.quantization import Storage
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
    assert 0 < rows["keys and values int8"]["agreement"] <= 1
    assert rows["int4"]["ms"] > 0 and rows["keys and values int8"]["ms"] is None
    with pytest.raises(DeliberateError, match="native first, then smaller"):
        run_benchmark(["precision", f"model={folder}", "storages=[int4]"])


def test_a_layer_that_rounding_leaves_as_it_is_loses_nothing(tmp_path):
    from deliberate.eval.benchmarks.precision import _base

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
    from deliberate.eval.benchmarks.precision import _base

    base = _base(str(save_checkpoint(tmp_path / "model")))
    text = Example([5, 6, 7], [8, 9])
    found = read(Backbone(base), [text])
    logits = base(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4].log_softmax(-1)
    assert found.nll[0] == pytest.approx(-float((logits[0, 8] + logits[1, 9]) / 2), abs=1e-5)
    other = Read([1.0, 3.0], [torch.tensor([1, 2]), torch.tensor([3, 3])], [True, False])
    own = Read([2.0, 3.0], [torch.tensor([1, 1]), torch.tensor([3, 3])], [False, True])
    assert agreement(own, other) == 0.75
    row = compared(own, other, 8)
    assert (row.right, row.lost, row.gained, row.nll_change) == (1, 1, 1, 0.5)
