"""The card of a packed model: where its weights came from, and figures of exactly these weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from random_checkpoint import LAYERS, save_checkpoint
from synthetic_runs import make_records, make_result

from deliberate.cli import app
from deliberate.eval.card import pack, write_card
from deliberate.eval.runner.results import write_results
from deliberate.utils.errors import DeliberateError


def run_record(model: dict[str, Any], recipe: str, **changes: Any) -> dict[str, Any]:
    figures = {f"loss/exit{n}": 2.0 / n for n in (1, 2, LAYERS)}
    figures |= {f"agree/exit{n}": n / LAYERS for n in (1, 2, LAYERS)}
    return {
        "command": f"deliberate train recipe={recipe}", "overrides": [], "recipe": recipe,
        "seed": 0, "steps": 2, "seconds": 120.0,
        "config": {
            "model": model,
            "recipe": {"name": recipe, "kl_weight": 1.0},
            "trainer": {"tokens_per_step": 8192, "processes": 1, "optimizer": "adamw",
                        "learning_rate": 5e-4, "decay_share": 0.35, "max_steps": 2},
            "data": {"weights": {"words": 3.0, "gsm8k": 1.0}, "max_tokens": 100},
        },
        "environment": {"cpu": "a CPU", "cores": 2, "gpus": ["none"],
                        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "wandb": None}},
        "history": [
            {"step": 1, "target_tokens": 90, "loss": 2.5, **figures},
            {"step": 2, "target_tokens": 90, "loss": float("nan"), **figures},
            {"train_runtime": 3.0},
        ],
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "model")
    return folder


def card(run: Path, target: Path, record: dict[str, Any]) -> str:
    (run / "run.json").write_text(json.dumps(record))
    if not target.is_dir():
        pack(run, target)
    return write_card(run, target, []).read_text(encoding="utf-8")


STOCK = {"kind": "folder", "path": "owner/stock", "tokenizer": None, "keep_layers": None}


@pytest.mark.parametrize("recipe", ["heads", "gate", "lora", "layerskip", "distill", "own"])
def test_the_card_of_a_trained_stock_checkpoint_names_it_and_what_was_done(run, tmp_path, recipe):
    text = card(run, tmp_path / "model", run_record(STOCK, recipe))
    intro = text.partition("## Training")[0]
    assert "`owner/stock`" in intro and "did not train it from scratch" in intro
    assert "Trained from scratch" not in text and "word problems and is there" not in text
    assert ("frozen" in intro) == (recipe in ("heads", "gate"))
    assert "| words | 75% |" in text and "2.0.1" not in text


def test_the_card_of_a_model_of_our_own_says_that_it_was_trained_from_scratch(run, tmp_path):
    text = card(run, tmp_path / "model", run_record({"kind": "scratch", "path": None}, "pretrain"))
    assert "Trained from scratch by this project." in text and "base model is" not in text


def test_kept_layers_of_a_base_model_are_named(run, tmp_path):
    record = run_record(STOCK | {"keep_layers": [1, 2, 5, 8]}, "distill")
    assert "of which layers 1, 2, 5, 8 were kept" in card(run, tmp_path / "model", record)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"history": []}, "no log line of training steps"),
        ({"history": [{"target_tokens": 1, "loss/exit1": 2.0}]}, "has no agree/exit1"),
        ({"environment": {}}, "environment.cpu: missing key"),
        ({"steps": "two"}, "steps: expected int"),
    ],
)
def test_a_record_that_cannot_make_a_card_is_one_line(run, tmp_path, changes, named):
    with pytest.raises(DeliberateError, match=named) as caught:
        card(run, tmp_path / "model", run_record(STOCK, "heads", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "model" / "README.md").exists()


def test_the_command_refuses_an_evaluation_of_other_weights(run, tmp_path, capsys):
    (run / "run.json").write_text(json.dumps(run_record(STOCK, "heads")))
    records = make_records(2)
    write_results(tmp_path / "other", make_result(records), records)
    with pytest.raises(SystemExit) as ended:
        app.main(["card", str(run), str(tmp_path / "model"), str(tmp_path / "other")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "evaluated weights a1a1" in error
