"""`deliberate bench gate` and `calibrate` on a model with a gate, from problems to figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gate_cases import shaken
from random_checkpoint import save_checkpoint
from tiny_calibration import tiny_calibration

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.eval.benchmarks import gate as bench_gate
from deliberate.eval.benchmarks.gate import BASELINE, Taken, compare, lambdas_between
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.eval.calibrate.command import calibrate, calibration_config
from deliberate.modeling.deliberation_gate import GateConfig
from deliberate.utils.errors import DeliberateError

NEW = 16
SMALL = ("problems=4", "warmup=1", "task.steps=[1,1]", f"task.max_new_tokens={NEW}", "lambdas=2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model whose gate fires at about half of the tokens, with a calibration."""
    folder = save_checkpoint(tmp_path_factory.mktemp("gated"))
    model = AdaptiveModel.from_pretrained(folder)
    config = GateConfig(rounds=1, think_below=0.1, width=24, heads=2)
    shaken(model.attach_gate(config))
    made = tiny_calibration(model)
    gate_thresholds = np.linspace(0.0, 0.3, len(made.policy.lambdas))
    table = dataclasses.replace(
        made.policy, gate_thresholds=tuple(gate_thresholds), rounds=tuple(gate_thresholds)
    )
    kept = [
        dataclasses.replace(
            c,
            policy=table.sha256,
            gate_threshold=table.gate_threshold(c.lambda_) if c.risk == "accuracy" else None,
        )
        for c in made.certificates
    ]
    model.set_calibration(dataclasses.replace(made, policy=table).with_certificates(*kept))
    model.save_pretrained(folder, merge=True)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_variant_answers_the_same_problems_and_is_held_against_no_gate(
    checkpoint, tmp_path, capsys
):
    out = tmp_path / "gate.json"
    risks = "risks=[0.2,0.01]"
    run_benchmark(["gate", f"model={checkpoint}", f"out={out}", risks, *SMALL])
    raw = json.loads(out.read_text())
    names = [row["name"] for row in raw["rows"]]
    assert names[:5] == [BASELINE, "dense", "exact", "threshold", "certified"]
    assert names[5:] == list(raw["prices"]) and len(names) == 7
    rows = {row["name"]: row for row in raw["rows"]}
    assert rows[BASELINE]["rounds"] == 0 < rows["dense"]["rounds"]
    assert rows[BASELINE]["time"] == 1.0 and rows[BASELINE]["gained"] == 0
    assert rows["exact"]["identical"] == rows["dense"]["identical"] == raw["problems"] == 4
    assert (
        rows["threshold"]["layers"]
        < rows["dense"]["layers"]
        == pytest.approx(4 * (1 - 1 / NEW), abs=0.5)
    )
    table = Calibration.load(checkpoint).policy
    for one in raw["prices"].values():
        assert one["band"] == table.gate_threshold(one["price"])
    assert "certified" in capsys.readouterr().out


def test_differences_are_counted_problem_by_problem_and_times_are_totals():
    base = Taken([1.0, 3.0, 2.0], [[1], [2], [3, 4]], [0, 0, 0], [4, 4, 8])
    own = Taken([2.0, 1.0, 0.0], [[1], [9], [3, 4]], [1, 0, 3], [4, 2, 8])
    right = {BASELINE: [True, False, True], "dense": [True, True, False]}
    row = compare({BASELINE: base, "dense": own}, right)[1]
    assert (row.gained, row.lost, row.difference) == (1, 1, 0.0)
    assert row.time == 0.5 and row.ms_per_token == pytest.approx(750.0)
    assert (row.rounds, row.layers) == (1.0, 3.5)
    assert row.time_interval.low < 0.5 < row.time_interval.high


def test_only_the_variants_given_are_run(checkpoint):
    every = bench_gate.variants_of(AdaptiveModel.from_pretrained(checkpoint), [0.1, 0.2])
    assert list(bench_gate.chosen(every, None)) == list(every) and len(every) == 7
    names = list(bench_gate.chosen(every, ["dense", "certified"]))
    assert names == [BASELINE, "dense", "certified"]
    assert list(bench_gate.chosen(every, ["lambdas"])) == [
        BASELINE,
        "lambda 0.1",
        "lambda 0.2",
    ]


def test_lambdas_span_the_risks_given(checkpoint):
    table = Calibration.load(checkpoint).policy
    found = lambdas_between(table, 3, [0.2, 0.01])
    assert found == sorted(found) and len(found) == 3
    assert found[0] == pytest.approx(table.lambda_for_risk(0.2))
    with pytest.raises(DeliberateError, match="two lambdas"):
        lambdas_between(table, 3, [0.2, 0.2])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problems=1", "problems=1 must be a whole number of at least 2"),
        ("lambdas=-1", "lambdas=-1"),
        ("lambdas=[-0.1]", "lambdas: -0.1 must be a number of at least 0"),
        ("prices=4", "prices=4: the setting is called lambdas now"),
        ("ways=[dense]", "the setting is called variants now"),
        ("clock=moon", "clock=moon"),
        ("variants=[fast]", "variants=fast is not one of dense, exact"),
        ("variants=[exact]", "dense beside exact"),
        ("variants=[]", "at least one"),
        ("risks=[0.1]", "risks=.0.1. must be two shares"),
        ("problem=3", "did you mean"),
    ],
)
def test_an_impossible_setting_is_named_before_anything_is_loaded(override, message):
    with pytest.raises(DeliberateError, match=message):
        bench_gate.main([override])


def test_a_model_without_a_gate_is_refused(tmp_path):
    plain = save_checkpoint(tmp_path / "plain")
    model = AdaptiveModel.from_pretrained(plain)
    tiny_calibration(model).save(plain / "calibration.json")
    with pytest.raises(DeliberateError, match="no deliberation gate"):
        run_benchmark(["gate", f"model={plain}", f"out={tmp_path / 'x.json'}", *SMALL])
    assert not (tmp_path / "x.json").exists()


def test_without_a_calibration_what_needs_none_is_measured(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "gated")
    model = AdaptiveModel.from_pretrained(folder)
    model.attach_gate(GateConfig(rounds=1, think_below=0.1, width=24, heads=2))
    model.save_pretrained(folder, merge=True)
    out = tmp_path / "gate.json"
    run_benchmark(["gate", f"model={folder}", f"out={out}", *SMALL[:-1]])
    raw = json.loads(out.read_text())
    assert [row["name"] for row in raw["rows"]] == [BASELINE, "dense", "exact", "threshold"]
    assert raw["prices"] == {} and "no calibration: no lambdas" in capsys.readouterr().out
    run_benchmark(["gate", f"model={folder}", f"out={out}", *SMALL[:-1], "variants=[dense]"])
    raw = json.loads(out.read_text())
    assert [row["name"] for row in raw["rows"]] == [BASELINE, "dense"]
    with pytest.raises(DeliberateError, match="no calibration"):
        run_benchmark(["gate", f"model={folder}", f"out={out}", *SMALL[:-1], "lambdas=[0.1]"])


def test_calibrate_gives_every_price_a_band_and_certifies_answers_under_it(checkpoint, tmp_path):
    settings = ("task.steps=[1,1]", f"task.max_new_tokens={NEW}", "costs=layers", "epsilon=0.5")
    cfg = calibration_config(
        [f"model={checkpoint}", "size=90", "device=cpu", f"out={tmp_path}", *settings]
    )
    run = calibrate(cfg, progress=False)
    table = run.calibration.policy
    assert len(table.gate_thresholds) == len(table.lambdas) and table.gate_thresholds[0] == 0.0
    deliberation = run.calibration.meta["thinking"]
    assert deliberation["tokens"] >= deliberation["tried"] > 0
    for certificate in run.calibration.certificates:
        expected = (
            table.gate_threshold(certificate.lambda_) if certificate.risk == "accuracy" else None
        )
        assert certificate.gate_threshold == expected
    model = AdaptiveModel.from_pretrained(checkpoint)
    model.set_calibration(tmp_path)
    again = calibration_config(
        [f"recording={tmp_path / 'recording.npz'}", f"model={checkpoint}", "device=cpu",
         f"out={tmp_path / 'again'}", "costs=layers"]
    )  # fmt: skip
    assert calibrate(again, progress=False).calibration.policy.gate_thresholds == ()
