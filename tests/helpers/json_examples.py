"""A valid folder with every kind of file that is read, and what reads each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from latency_plant import plant_cost
from synthetic_recordings import synthetic_recording
from synthetic_runs import make_records, make_result

from deliberate.api.adapters import load_adapter
from deliberate.api.checkpoint import CONFIG_NAME, adapter_base, read_adaptive_config
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration, fit_calibration
from deliberate.calibration.certificate import Certificate
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.cost.cache import recall
from deliberate.cost.model import CostModel
from deliberate.data.sources import file_rows
from deliberate.eval.benchmarks.exits import earlier
from deliberate.eval.runner.results import PROBLEMS_FILE, RESULTS_FILE, read_results, write_results
from deliberate.kernels.tools import gpu_session
from deliberate.modeling.deliberation_gate import GateConfig
from deliberate.modeling.exit_config import ExitConfig
from deliberate.train.checkpoints import newest_intact, seal
from deliberate.train.compare import read_jobs, summarise, table
from deliberate.train.resume import _read as read_config
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read_json
from deliberate.utils.training_record import read_run

FILES: dict[str, Callable[[Path], Any]] = {}
"""By file, what reads it in a folder and uses what it read."""
LAYERS = 8


def reads(name: str) -> Callable:
    def add(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        FILES[name] = function
        return function

    return add


@reads(CONFIG_NAME)
def _adaptive(folder: Path) -> None:
    saved = read_adaptive_config(str(folder))
    ExitConfig.from_dict(saved.exits, num_layers=LAYERS).with_thresholds(0.5).to_dict()
    if saved.gate is not None:
        GateConfig.from_dict(saved.gate)


@reads("calibration.json")
def _calibration(folder: Path) -> None:
    found = Calibration.load(folder)
    for k in range(len(found.layers)):
        found.probability(k, [0.0, 0.5, 1.0])
        found.calibrators[k].least_score(0.5)
    for lambda_ in (0.0, 1e-3, 1.0, float("inf")):
        assert len(found.thresholds(lambda_)) == len(found.layers)
        found.gate_threshold(lambda_)
    found.policy.costs()
    assert all(len(c.thresholds) == len(found.layers) for c in found.certificates)
    Calibration.from_dict(found.to_dict())


@reads("certificate.json")
def _certificate(folder: Path) -> None:
    found = Certificate.load(folder / "certificate.json")
    found.check(weights=found.weights, conditions={})
    assert Certificate.from_dict(found.to_dict()) == found


@reads("cost-0000000000000000.json")
def _cost(folder: Path) -> None:
    assert recall("0" * 64, folder) is None or isinstance(recall("0" * 64, folder), CostModel)
    cost = CostModel.from_dict(read_json(folder / "cost-0000000000000000.json"))
    cost.dense_seconds_per_token()
    cost.least_seconds_per_token(8)
    cost.continuation_seconds()
    cost.prompt_seconds(40)


@reads("recording.json")
def _recording(folder: Path) -> None:
    stored = dict(np.load(folder / "arrays.npz"))
    stored["head"] = np.frombuffer((folder / "recording.json").read_bytes(), dtype=np.uint8)
    np.savez(folder / "recording.npz", **stored)
    found = Recording.load(folder / "recording.npz")
    replay(found, [0.5] * found.num_exits)
    assert len(found.token_groups) == len(found)


@reads(RESULTS_FILE)
@reads(PROBLEMS_FILE)
def _results(folder: Path) -> None:
    read_results(folder)


@reads("run.json")
def _run(folder: Path) -> None:
    read_run(folder)


@reads("0/run.json")
def _jobs(folder: Path) -> None:
    jobs = read_jobs(folder)
    summarise(jobs)
    table(jobs)


@reads("exits.json")
@reads("exits.jsonl")
def _baseline(folder: Path) -> None:
    task = SimpleNamespace(problems=[SimpleNamespace(id="a"), SimpleNamespace(id="b")])
    earlier(folder / "exits.json", task)


@reads("adapter/adapter_config.json")
@reads("adapter/exits.json")
def _adapter(folder: Path) -> None:
    adapter_base(str(folder / "adapter"))
    load_adapter(AdaptiveModel, folder / "adapter")


@reads("config.yaml")
def _settings(folder: Path) -> None:
    read_config(folder / "config.yaml")


@reads("checkpoint-1/manifest.json")
def _checkpoint(folder: Path) -> None:
    newest_intact(folder)


@reads("rows.jsonl")
def _rows(folder: Path) -> None:
    list(file_rows(folder / "rows.jsonl"))


@reads("decode.json")
def _bench(folder: Path) -> None:
    json.dumps(gpu_session._saved(folder / "decode.json"))


@dataclass(frozen=True)
class Example:
    """A valid folder, and the text of each of its files."""

    folder: Path
    texts: dict[str, str]


RUN = {
    "command": "deliberate train", "overrides": ["seed=0"], "recipe": "heads", "seed": 0,
    "steps": 10, "seconds": 4.5, "notes": ["shared"],
    "config": {
        "model": {"kind": "folder", "path": "x", "keep_layers": None},
        "recipe": {"name": "heads", "kl_weight": 1.0},
        "trainer": {"tokens_per_step": 8192, "processes": 1, "optimizer": "adamw",
                    "learning_rate": 5e-4, "decay_share": 0.35},
        "data": {"weights": {"words": 0.8, "gsm8k": 0.2}},
    },
    "environment": {"cpu": "x", "cores": 2, "versions": {"torch": "2", "transformers": "5"}},
    "history": [{"loss": 1.5, "step": 1, "loss/exit2": 2.0, "agree/exit2": 0.5}],
}  # fmt: skip
BASELINE = {
    "models": {"model": {"depths": [{"layer": 2, "tokens": 9, "truncated": 0, "total": 2}]}}
}


def write_example(folder: Path) -> Example:
    """Files of every kind in an empty folder."""
    steps = StepCosts.in_layers((2, 4, 6), LAYERS)
    fitted = fit_calibration(synthetic_recording(60), steps, weights="w" * 64, exits="e" * 64)
    table = fitted.policy
    certificate = Certificate(
        risk="token", epsilon=0.1, delta=0.05, n=100, observed=0.01, lambda_=table.lambdas[1],
        thresholds=table.rows[1], disagreement=0.2, weights="w", exits="e", policy=table.sha256,
        data="d", conditions={"task": "words"},
    )  # fmt: skip
    whole_calibration = fitted.with_certificates(certificate).to_dict()
    del whole_calibration["sha256"]  # as of earlier releases: no edit is refused for its hash
    certificate.save(folder / "certificate.json")
    records = make_records(2)
    write_results(folder, make_result(records), records)
    synthetic_recording(2, 2).save(folder / "whole.npz")
    whole = dict(np.load(folder / "whole.npz"))
    exits = ExitConfig(layers=(1, 2), thresholds=(0.5, 0.5)).to_dict()
    made = {
        CONFIG_NAME: {
            "format_version": 1, "exits": exits, "base": ".", "base_revision": None,
            "gate": GateConfig().to_dict(),
        },
        "cost-0000000000000000.json": plant_cost().to_dict() | {"fingerprint": "0" * 64},
        "recording.json": json.loads(whole.pop("head").tobytes()),
        "calibration.json": whole_calibration,
        "run.json": RUN,
        "0/run.json": RUN,
        "exits.json": BASELINE,
        "adapter/adapter_config.json": {
            "base_model_name_or_path": "./nowhere", "r": 4, "lora_alpha": 8,
            "target_modules": ["q"],
        },
        "adapter/exits.json": exits,
        "config.yaml": {"seed": 0, "trainer": {"max_steps": 5}},
        "decode.json": {"suites": {}},
    }  # fmt: skip
    np.savez(folder / "arrays.npz", **whole)
    for name, value in made.items():
        write_text(folder / name, json.dumps(value))
    (folder / "saving").mkdir()
    (folder / "saving" / "model.safetensors").write_bytes(b"x")
    seal(folder / "saving", folder / "checkpoint-1")
    answer = {"text": "3", "correct": True}
    lines = [json.dumps({"id": one, "model": {"2": answer}}) for one in "ab"]
    (folder / "exits.jsonl").write_text("\n".join(lines))
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in FILES}
    return Example(folder, texts)
