"""Folders and files that earlier states of the project wrote load, decode and count as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.cost.model import CostModel
from deliberate.eval.report.page import write_report
from deliberate.eval.runner.results import read_results

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "2026-11-22"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return AdaptiveModel.from_pretrained(FOLDER / "model", executor="generic")


def decode(model: AdaptiveModel, **settings: object) -> list[int]:
    prompt = torch.tensor([EXPECTED["prompt"]])
    output = model.generate(prompt, max_new_tokens=16, do_sample=False, **settings)
    return output[0, prompt.shape[1] :].tolist()


def test_a_saved_model_has_the_exits_gate_and_hashes_that_it_had(model):
    assert model.exit_config.layers == (1, 3)
    assert list(model.exit_config.thresholds) == EXPECTED["thresholds"]
    assert model.gate.config.rounds == 2 and model.gate.config.think_below == 0.9
    assert model.fingerprints() == (EXPECTED["weights"], EXPECTED["exits"])


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
def test_a_saved_model_decodes_the_tokens_that_it_decoded(model, fidelity):
    assert decode(model, fidelity=fidelity) == EXPECTED["tokens"][fidelity]


def test_a_saved_calibration_belongs_to_its_model_and_sets_the_thresholds_of_a_lambda(model):
    calibration = model.calibration
    assert isinstance(calibration, Calibration)
    assert calibration.policy.sha256 == EXPECTED["policy"]
    assert {str(one.risk) for one in calibration.certificates} == {"accuracy", "token"}
    tokens = decode(model, fidelity="threshold", lambda_=EXPECTED["lambda"])
    assert tokens == EXPECTED["tokens"]["lambda"]


def test_saving_it_again_writes_the_same_exits_gate_and_calibration(model, tmp_path):
    model.save_pretrained(tmp_path, merge=True)
    for name in ("adaptive_config.json", "exits.safetensors", "gate.safetensors"):
        assert (tmp_path / name).read_bytes() == (FOLDER / "model" / name).read_bytes(), name
    before = json.loads((FOLDER / "model" / "calibration.json").read_text())
    after = json.loads((tmp_path / "calibration.json").read_text())
    assert {key: after[key] for key in before} == before


def test_a_recording_is_replayed_as_before():
    counts = replay(Recording.load(FOLDER / "recording.npz"), (0.6, 0.6)).counts
    assert list(counts) == EXPECTED["replay"]


def test_a_cost_model_is_written_as_it_was_read():
    raw = json.loads((FOLDER / "cost.json").read_text())
    assert json.loads(json.dumps(CostModel.from_dict(raw).to_dict())) == raw


def test_an_evaluation_is_read_and_reported(tmp_path):
    result, records = read_results(FOLDER / "evaluation")
    assert result.task["problems"] == len(records) == 3
    assert set(result.modes) == {"transformers", "dense", "exact", "threshold"}
    page = write_report(tmp_path, [(result, records)])
    assert records[0].id in page.read_text(encoding="utf-8")
