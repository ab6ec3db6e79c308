"""`deliberate bench skip`: what adds nothing costs nothing to leave out, the rest does."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint
from tiny_models import tiny_model

from deliberate.data.prompts import Example
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.benchmarks.skip import (
    averages,
    compare,
    smallest,
    units,
    without,
    without_loss,
)
from deliberate.eval.benchmarks.teacher_forced import read
from deliberate.modeling.backbone import Backbone
from deliberate.utils.errors import DeliberateError

TEXTS = [Example(list(range(5, 12)), list(range(20, 40)))] * 2


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.choices, other.choices, strict=True))


@pytest.fixture(scope="module")
def backbone():
    """A model whose first half of the MLP rows, and whose first head, add nothing."""
    base = tiny_model("llama", layers=3)
    heads = base.config.num_attention_heads
    with torch.no_grad():
        for layer in base.model.layers:
            down, out = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
            down[:, : down.shape[1] // 2] = 0
            out[:, : out.shape[1] // heads] = 0
    return Backbone(base)


@pytest.mark.parametrize("name", ["rows", "heads"])
def test_what_adds_nothing_is_left_out_first_and_changes_nothing(backbone, name):
    own = units(backbone)[name]
    whole = read(backbone, TEXTS)
    usual = averages(backbone, own, TEXTS)
    count = own[0].count
    dead = count // 2 if name == "rows" else 1
    assert all((one[:dead] == 0).all() and (one[dead:] > 0).all() for one in usual)
    with without(own, lambda number, x: smallest(usual[number], dead / count)):
        assert read(backbone, TEXTS).nll == whole.nll
    with without(own, lambda number, x: smallest(-own[number].added(x), dead / count)):
        found = read(backbone, TEXTS)
    assert found.nll != whole.nll and not same(found, whole)
    assert read(backbone, TEXTS).nll == whole.nll  # nothing stays behind


def test_what_a_row_or_a_head_adds_is_its_part_of_the_product(backbone):
    for name, own in units(backbone).items():
        unit = own[1]
        values = torch.randn(3, unit.product.in_features).to(unit.product.weight)
        width = values.shape[-1] // unit.count
        for number in range(unit.count):
            alone = torch.zeros_like(values)
            part = slice(number * width, (number + 1) * width)
            alone[:, part] = values[:, part]
            added = torch.nn.functional.linear(alone, unit.product.weight).norm(dim=-1)
            torch.testing.assert_close(unit.added(values)[:, number], added, msg=name)


def test_a_share_without_loss_has_none_below_that_loses(backbone):
    rows = compare(backbone, TEXTS, TEXTS, [0.25, 0.5, 0.9])["rows, known"]
    assert rows[0.5].agreement == 1 > rows[0.9].agreement
    assert without_loss(rows, 1.0, 0.0) == 0.5
    assert without_loss({0.7: rows[0.25], 0.3: rows[0.9]}, 1.0, 0.0) == 0.0


def test_another_kind_of_layer_is_refused_by_name():
    with pytest.raises(DeliberateError, match="'gpt2' have others: take a Llama-like model"):
        units(Backbone(tiny_model("gpt2")))


def test_the_command_writes_every_share(tmp_path):
    folder, out = save_checkpoint(tmp_path / "model"), tmp_path / "out.json"
    common = [f"model={folder}", "limit=4", "task.size=4", "rounds=4", "shares=[0.2,0.6]"]
    run_benchmark(["skip", *common, f"out={out}"])
    found = json.loads(out.read_text())
    assert len(found["rows"]) == len(found["without_loss"]) == 5
    for name, own in found["rows"].items():  # a fifth of two heads is none
        assert list(own) == (["0.6"] if name.startswith("heads") else ["0.2", "0.6"])
    assert found["seconds"]["0.0"] > 0 and set(found["without_loss"].values()) <= {0, 0.2, 0.6}


def test_shares_outside_zero_and_one_are_refused(tmp_path):
    with pytest.raises(DeliberateError, match=r"shares=\[1.0\]: give shares between 0 and 1"):
        run_benchmark(["skip", "model=tiny", "shares=[1.0]"])
