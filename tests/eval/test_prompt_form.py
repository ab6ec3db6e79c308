"""The prompt form that a certificate states is the one that was asked, in every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.calibration.calibration import Calibration
from deliberate.cli import app as cli
from deliberate.eval.calibrate.command import calibrate, calibration_config
from deliberate.eval.runner import command as app
from deliberate.eval.tasks.prompts import condition_departures, prompt_sha256, question_encoder
from deliberate.eval.tasks.registry import evaluation_config

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


def test_generate_notes_a_prompt_that_was_not_certified(checkpoint, calibrated, capsys) -> None:
    requested = ["generate", "Is it?", "--model", str(checkpoint), "--fidelity", "certified"]
    requested += ["--risk", "token", "--calibration", str(calibrated), "--max-new-tokens", "12"]
    for more, noted in (([], False), (["--chat", "never"], True), (["--raw"], True)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*requested, *more])
        assert ended.value.code == 0
        assert ("guarantees nothing for this run: prompt" in capsys.readouterr().out) is noted


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
