"""The prompt form that a certificate states is the one that was asked, in every command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.calibration.conditions import PROMPT_ENDS, conditions_sha256
from deliberate.cli import app as cli
from deliberate.engine.spec import DecodingSpec
from deliberate.eval.calibrate.command import calibrate, calibration_config
from deliberate.eval.runner import command as app
from deliberate.eval.tasks.prompts import condition_departures, prompt_sha256, question_encoder
from deliberate.eval.tasks.registry import evaluation_config
from deliberate.policies.guarantee_settings import decoding_conditions

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
ASKED = "<user>{question}<assistant>"
SMALL = ("task.steps=[1,2]", "task.max_new_tokens=12", "device=cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A chat model: its tokenizer has a chat template."""
    folder = save_checkpoint(tmp_path_factory.mktemp("chat"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(checkpoint, tmp_path_factory) -> Path:
    """The folder of a calibration by default settings."""
    out = tmp_path_factory.mktemp("calibration")
    settings = ["size=120", "costs=layers", "epsilon=0.7", *SMALL]
    calibrate(calibration_config([f"model={checkpoint}", *settings, f"out={out}"]), progress=False)
    return out


def departures(checkpoint: Path, calibrated: Path, out: Path, *overrides: str) -> list[str]:
    cfg = evaluation_config(
        [f"model={checkpoint}", f"calibration={calibrated}", f"out={out}", "risk=token", "limit=2",
         "modes=[certified]", "warmup=0", *SMALL, *overrides]
    )  # fmt: skip
    return app.evaluate(cfg, progress=False).result.certified.departures


def test_a_certificate_states_the_prompt_that_was_asked(calibrated) -> None:
    for certificate in Calibration.load(calibrated).certificates:
        assert certificate.conditions["prompt"] == ASKED
        assert len(certificate.conditions["prompt_sha256"]) == 64


def test_eval_with_the_settings_of_calibrate_keeps_its_conditions(
    checkpoint, calibrated, tmp_path
) -> None:
    assert departures(checkpoint, calibrated, tmp_path) == []
    found = departures(checkpoint, calibrated, tmp_path, "chat=never")
    assert len(found) == 1 and found[0].endswith(f"instead of {ASKED!r}")
    assert departures(checkpoint, calibrated, tmp_path, "system=Think.") != []


def test_generate_refuses_a_prompt_that_was_not_certified(checkpoint, calibrated, capsys) -> None:
    requested = ["generate", "Is it?", "--model", str(checkpoint), "--fidelity", "certified"]
    requested += ["--risk", "token", "--calibration", str(calibrated)]
    for more, refused in (([], False), (["--chat", "never"], True), (["--raw"], True)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*requested, *more])
        out, err = capsys.readouterr()
        assert ended.value.code == (2 if refused else 0)
        assert (f"for prompts of the form {ASKED!r}" in err) is refused
        assert "guarantees nothing" not in out


def test_generate_notes_a_prompt_that_an_earlier_certificate_was_not_made_for(
    checkpoint, calibrated, tmp_path, capsys
) -> None:
    found = Calibration.load(calibrated)
    earlier = [
        replace(
            certificate,
            conditions={k: v for k, v in certificate.conditions.items() if k != PROMPT_ENDS},
            conditions_sha256="",
        )
        for certificate in found.certificates
    ]
    found.with_certificates(*earlier).save(tmp_path / "calibration.json")
    requested = ["generate", "Is it?", "--model", str(checkpoint), "--fidelity", "certified"]
    requested += ["--risk", "token", "--calibration", str(tmp_path)]
    for more, noted in (([], False), (["--chat", "never"], True), (["--raw"], True)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*requested, *more])
        assert ended.value.code == 0
        assert ("guarantees nothing for this run: prompt" in capsys.readouterr().out) is noted


def test_every_condition_of_a_calibration_is_in_one_hash(checkpoint, calibrated) -> None:
    token = Calibration.load(calibrated).certificate("token")
    stated = token.conditions
    assert token.conditions_sha256 == conditions_sha256(stated)
    assert set(stated) == {
        *("task", "grading", "prompt", "prompt_sha256", "prompt_ends", "max_new_tokens", "dtype"),
        *("kv_mode", "kv_storage", "schedule", "gate", "sampling", "constraint"),
        *("executor", "storage"),
    }
    assert stated["max_new_tokens"] == 12 and stated["sampling"] == "greedy"
    model = AdaptiveModel.from_pretrained(checkpoint)
    here = decoding_conditions(model, DecodingSpec(), max_new_tokens=12)
    assert {name: here[name] for name in here if name in stated}.items() <= stated.items()
    encoder = question_encoder(load_tokenizer(checkpoint), chat="auto", system=None, max_tokens=99)
    first, last = stated["prompt_ends"]
    for question in ("Is it?", "How many?"):
        ids = encoder.prompt(question)
        assert ids[: len(first)] == first and ids[-len(last) :] == last and first and last


def test_an_evaluation_in_other_conditions_measures_the_policy_without_the_guarantee(
    checkpoint, calibrated, tmp_path
) -> None:
    found = departures(
        checkpoint, calibrated, tmp_path, "task.max_new_tokens=15", "task.style=boxed",
        "executor=generic",
    )  # fmt: skip
    assert [one.split()[0] for one in found] == ["grading", "max_new_tokens", "executor"]


def test_a_certificate_of_a_recording_states_what_the_recording_asked(
    checkpoint, calibrated, tmp_path
) -> None:
    cfg = calibration_config(
        [f"recording={calibrated / 'recording.npz'}", "costs=layers", "epsilon=0.7", "model=x",
         "task=gsm8k", "chat=never", f"out={tmp_path}"]
    )  # fmt: skip
    (again,) = calibrate(cfg, progress=False).calibration.certificates
    (before,) = (c for c in Calibration.load(calibrated).certificates if c.risk == "token")
    assert again.conditions == before.conditions
    assert again.conditions["task"] == "words"


def test_a_form_that_was_not_recorded_is_not_taken_for_the_same(checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    run = {"prompt": ASKED, "prompt_sha256": "a"}
    old = {"prompt": ASKED}
    assert condition_departures(old, run) == []
    assert "calibrate again" in condition_departures(old, run, tokenizer)[0]
    assert condition_departures(run, run, tokenizer) == []
    other = {"prompt": ASKED, "prompt_sha256": "b"}
    assert "tokens are others" in condition_departures(other, run, tokenizer)[0]


def test_the_hash_of_a_form_tells_forms_apart(checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    forms = [("auto", None), ("never", None), ("auto", "Think.")]
    encoders = [
        question_encoder(tokenizer, chat=chat, system=system, max_tokens=99)
        for chat, system in forms
    ]
    assert len({prompt_sha256(encoder) for encoder in encoders}) == 3
