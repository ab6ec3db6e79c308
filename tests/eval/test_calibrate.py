"""The command calibrate, and what it leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_checkpoint import save_checkpoint
from rich.console import Console
from synthetic_recordings import synthetic_recording
from tiny_calibration import tiny_cost

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.calibration import certificate as certificates
from deliberate.calibration.calibration import Calibration, assess, fit_calibration
from deliberate.calibration.exit_traces import Recording
from deliberate.calibration.fingerprint import base_sha256, exits_sha256
from deliberate.calibration.stopping_policy import StepCosts
from deliberate.cli import app
from deliberate.cost import measure as cost_measure
from deliberate.cost.parts import PassCost, WarmCost
from deliberate.data.prompts import Encoder
from deliberate.eval.calibrate.certify import accuracy_lambdas
from deliberate.eval.calibrate.command import calibrate, calibration_config, calibration_task
from deliberate.eval.calibrate.tables import print_calibration
from deliberate.eval.report.reliability_figure import write_reliability
from deliberate.eval.runner.batched import decode_answers
from deliberate.eval.tasks.registry import build_task, evaluation_config
from deliberate.utils.errors import DeliberateError

COSTS = StepCosts(2.0, (2.0, 2.0, 2.0), "layers")
SMALL = (
    "size=60",
    "task.steps=[1,2]",
    "task.max_new_tokens=20",
    "costs=layers",
    "device=cpu",
    "epsilon=0.5",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "a b"
    cfg = calibration_config([f"model={checkpoint}", *SMALL, f"out={out}"])
    return calibrate(cfg, progress=False)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    recording = synthetic_recording(120)
    recording = replace(recording, others={"margin": recording.scores**2})
    return fit_calibration(recording, COSTS, weights="w" * 64, exits="e" * 64, data="d" * 64)


def test_a_run_writes_recording_calibration_and_diagram_and_nothing_else(run, checkpoint) -> None:
    folder = run.path.parent
    assert sorted(p.name for p in folder.iterdir()) == [
        "calibration.json", "recording.npz", "reliability.png", "reliability.svg",
    ]  # fmt: skip
    found = Calibration.load(folder)
    assert found == run.calibration and found.layers == (1, 2)
    model = AdaptiveModel.from_pretrained(checkpoint)
    found.check(weights=base_sha256(model), exits=exits_sha256(model))
    recording = Recording.load(folder / "recording.npz")
    assert recording.meta["left_out"] == 0
    assert recording.num_sequences == 60 and recording.meta["weights"] == found.weights
    assert found.meta["fitted"]["sequences"] == found.meta["held_out"]["sequences"] == 30
    assert {c.risk for c in found.certificates} == {"token", "accuracy"}
    for certificate in found.certificates:
        certificate.check(
            weights=base_sha256(model), policy=found.policy.sha256, conditions={"task": "words"}
        )
        assert certificate.thresholds == found.thresholds(certificate.lambda_)
        assert certificate.n == 30


def test_a_calibration_is_repeated_from_its_recording_without_the_model(run, tmp_path) -> None:
    cfg = calibration_config(
        [f"recording={run.path.parent / 'recording.npz'}", *SMALL[3:], f"out={tmp_path}", "model=x"]
    )
    again = calibrate(cfg, progress=False)
    assert again.calibration.calibrators == run.calibration.calibrators
    assert again.calibration.policy == run.calibration.policy
    assert again.calibration.weights == run.calibration.weights
    assert [c.risk for c in again.calibration.certificates] == ["token"]
    assert "accuracy is not certified" in again.notes[0]


def test_a_recording_of_another_model_is_refused(run, tmp_path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    cfg = calibration_config(
        [f"recording={run.path.parent / 'recording.npz'}", f"model={other}", f"out={tmp_path}/o"]
    )
    with pytest.raises(DeliberateError, match="recording is of other weights"):
        calibrate(cfg, progress=False)
    assert not (tmp_path / "o").exists()


def test_calibration_problems_are_not_those_of_eval(tmp_path) -> None:
    requested = calibration_task(calibration_config(["size=200"]))
    cfg = evaluation_config(["task.size=400"])
    put = build_task(cfg.task, seed=cfg.seed)
    assert {p.question for p in requested.problems} != {p.question for p in put.problems}
    (tmp_path / "math").mkdir()
    row = {"problem": "1+1?", "solution": "\\boxed{2}", "level": "Level 1", "type": "Algebra"}
    (tmp_path / "math" / "train.jsonl").write_text(json.dumps(row))
    for name in ("math", "math500"):
        fixed = calibration_task(calibration_config([f"task={name}", f"data.dir={tmp_path}"]))
        assert fixed.split == "train" and len(fixed.problems) == 1
    chain = calibration_task(calibration_config(["task=chain_sum", "size=20"]))
    cfg = evaluation_config(["task=chain_sum", "limit=200"])
    put = build_task(cfg.task, seed=cfg.seed, limit=200)
    assert not {p.id for p in chain.problems} & {p.id for p in put.problems}


def test_answers_do_not_depend_on_the_batch_and_dense_ones_are_transformers(checkpoint) -> None:
    model = AdaptiveModel.from_pretrained(checkpoint, dtype="float64")
    tokenizer = load_tokenizer(checkpoint)
    encoder = Encoder(tokenizer, max_tokens=99)
    prompts = [encoder.prompt(text) for text in ("How many?", "x", "Ada has 3 apples. And?")]
    wide = decode_answers(model, tokenizer, prompts, max_new_tokens=12, batch=3)
    assert wide == decode_answers(model, tokenizer, prompts, max_new_tokens=12, batch=1)
    for prompt, answer in zip(prompts, wide, strict=True):
        ids = torch.tensor([prompt])
        made = model.base.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert list(answer) == made[0, len(prompt) :].tolist()
    never = decode_answers(
        model, tokenizer, prompts, max_new_tokens=12, batch=3, thresholds=[np.inf, np.inf]
    )
    always = decode_answers(
        model, tokenizer, prompts, max_new_tokens=12, batch=3, thresholds=[0.0, 0.0]
    )
    assert never == wide != always


def test_calibration_survives_its_file(calibration, tmp_path) -> None:
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path) == calibration
    assert set(calibration.others) == {"margin"}
    scores = np.linspace(0, 1, 9)
    np.testing.assert_array_equal(
        calibration.probability(1, scores), calibration.calibrators[1](scores)
    )


def test_a_calibration_of_another_model_is_refused_by_name(calibration) -> None:
    calibration.check(weights="w" * 64, exits="e" * 64)
    with pytest.raises(DeliberateError, match="for other weights"):
        calibration.check(weights="x" * 64)
    with pytest.raises(DeliberateError, match="for other exits"):
        calibration.check(exits="x" * 64)


def test_a_wanted_certificate_is_found_or_the_existing_ones_are_listed(run, calibration) -> None:
    found = run.calibration.certificate("token", epsilon=0.5, delta=0.05)
    assert found.risk == "token"
    with pytest.raises(DeliberateError, match=r"risk token, epsilon <= 0.1; there is token"):
        run.calibration.certificate("token", epsilon=0.1)
    with pytest.raises(DeliberateError, match="there is none"):
        calibration.certificate("accuracy")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw.pop("policy"), "policy: missing key"),
        (lambda raw: raw.pop("format_version"), "no format_version"),
        (lambda raw: raw.update(format_version=9), "format_version 9"),
        (lambda raw: raw["calibrators"].pop(), "2 calibrators for 3 exits"),
        (lambda raw: raw.update(policy=3), "policy: expected an object"),
    ],
)
def test_a_damaged_calibration_is_one_line_that_names_the_file(
    calibration, tmp_path, change, named
) -> None:
    raw = json.loads(json.dumps(calibration.to_dict()))
    change(raw)
    (tmp_path / "calibration.json").write_text(json.dumps(raw))
    with pytest.raises(DeliberateError, match=named) as caught:
        Calibration.load(tmp_path)
    assert "calibration.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["policy"]["shares"][0].__setitem__(0, 0.125),
        lambda raw: raw["policy"]["risks"].__setitem__(0, 0.5),
        lambda raw: raw["certificates"][0].update(disagreement=0.25),
        lambda raw: raw["meta"].update(note="better than it was"),
    ],
    ids=["share", "risk", "certificate", "meta"],
)
def test_a_calibration_file_that_was_edited_is_refused(run, tmp_path, edit) -> None:
    raw = json.loads((run.path).read_text())
    edit(raw)
    (tmp_path / "calibration.json").write_text(json.dumps(raw))
    with pytest.raises(DeliberateError, match=r"calibration.json: .* edited or damaged"):
        Calibration.load(tmp_path)
    del raw["sha256"]  # as a file of an earlier release
    (tmp_path / "calibration.json").write_text(json.dumps(raw))
    assert Calibration.load(tmp_path)


def test_a_missing_calibration_says_how_to_make_one(tmp_path) -> None:
    with pytest.raises(DeliberateError, match="deliberate calibrate"):
        Calibration.load(tmp_path)


def test_reliability_is_given_by_group_where_a_group_is_large(calibration) -> None:
    fresh = synthetic_recording(60, seed=9)
    for overall, groups in assess(calibration, fresh):
        assert set(groups) == {"odd", "even"}
        assert sum(each.tokens for each in groups.values()) == overall.tokens == len(fresh)
    assert assess(calibration, fresh.select(range(6)))[0][1] == {}


def test_the_diagram_is_the_same_for_the_same_data(calibration, tmp_path) -> None:
    found = [overall for overall, _ in assess(calibration, synthetic_recording(60, seed=9))]
    names = ["exit after layer 2", "b", "c"]
    vector, raster = write_reliability(tmp_path, names, found)
    first = vector.read_text()
    assert "exit after layer 2" in first and raster.stat().st_size > 1000
    assert write_reliability(tmp_path, names, found)[0].read_text() == first


def test_prices_tried_for_accuracy_are_few_and_from_careful_to_cheap(calibration) -> None:
    lambdas = accuracy_lambdas(calibration.policy, 20.0, 0.5)
    assert 2 <= len(lambdas) <= 11 and lambdas == sorted(lambdas)
    risks = [calibration.policy.risks[calibration.policy.lambdas.index(p)] for p in lambdas]
    assert risks == sorted(risks, reverse=True)
    assert set(lambdas) <= set(calibration.policy.lambdas[:-1])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["task=nix"], "task 'nix' is unknown"),
        (["sizes=3"], "did you mean size"),
        (["size=0"], "size=0"),
        (["fit_share=1.5"], "fit_share=1.5"),
        (["epsilon=0"], "epsilon=0"),
        (["delta=nan"], "delta=nan"),
        (["certify=[luck]"], "risk 'luck'"),
        (["certify=token"], "must be a list"),
        (["costs=free"], "costs=free"),
        (["model=./gone"], "model './gone'"),
        (["recording=gone.npz"], "gone.npz"),
        (["--fast"], "--fast"),
        (
            ["size=30", "task.steps=[1,1]", "task.max_new_tokens=20", "model={model}"],
            "of 30 problems 15 fit calibrators (fit_share=0.5): use size=",
        ),
        (["size=4", "model={model}", "task.max_new_tokens=159"], "in the context of 160"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(
    capsys, monkeypatch, tmp_path, checkpoint, overrides, named
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [each.replace("{model}", str(checkpoint)) for each in overrides]
    with pytest.raises(SystemExit) as ended:
        app.main(["calibrate", *given, *([] if "costs=free" in given else ["costs=layers"])])
    found = capsys.readouterr()
    assert ended.value.code == 2 and named in found.err and found.err.count("\n") == 1
    assert not list(tmp_path.rglob("calibration.json"))


def test_untrained_exits_are_refused_with_the_command_that_trains_them(
    capsys, monkeypatch, tmp_path, checkpoint
) -> None:
    monkeypatch.chdir(tmp_path)
    base = AdaptiveModel.from_pretrained(checkpoint).base
    base.save_pretrained("stock")
    load_tokenizer(checkpoint).save_pretrained("stock")
    with pytest.raises(SystemExit) as ended:
        app.main(["calibrate", "model=stock", *SMALL[1:], "out=there"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "untrained" in error and "+experiment=heads data=self model.path=stock" in error
    assert not list(tmp_path.rglob("recording.npz")), "nothing was decoded"


def test_the_size_that_an_error_asks_for_is_above_the_one_given_and_enough(
    checkpoint, tmp_path
) -> None:
    settings = [f"model={checkpoint}", *SMALL[1:], f"out={tmp_path}"]
    with pytest.raises(DeliberateError, match="use size=") as caught:
        calibrate(calibration_config([*settings, "size=30"]), progress=False)
    wanted = int(str(caught.value).rpartition("size=")[2])
    assert 30 < wanted < 120
    found = calibrate(calibration_config([*settings, f"size={wanted}"]), progress=False)
    assert found.path.is_file()


def test_a_certificate_that_fails_says_which_size_could_give_one(run) -> None:
    first = certificates.Tested(lambda_=1.0, n=30, mean=0.0, p_value=0.2, rejected=False)
    failed = replace(
        run, testing={"token": certificates.Testing((first,), epsilon=0.01, delta=0.05)},
        calibration=run.calibration.with_certificates(),
    )  # fmt: skip
    console = Console(record=True, width=200)
    print_calibration(console, failed)
    # 299 problems without a loss test, and as many fit
    assert "never fewer than 299 for testing alone, which is size=598" in console.export_text()


def test_the_command_prints_errors_policy_rules_and_certificates(
    capsys, monkeypatch, tmp_path, run
) -> None:
    monkeypatch.chdir(tmp_path)
    recording = run.path.parent / "recording.npz"
    with pytest.raises(SystemExit) as ended:
        app.main(["calibrate", f"recording={recording}", *SMALL[3:], "out=x"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for expected in ("calibration error", "never", "token: certified at epsilon=0.5", "x/calib"):
        assert expected in out
    assert max(map(len, out.splitlines()[:20])) <= 80


def test_help_shows_settings_and_tasks(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        app.main(["calibrate", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "fit_share: 0.5" in out and "gsm8k" in out


def test_exits_that_lose_time_are_never_evaluated_under_a_certificate(
    run, checkpoint, tmp_path, monkeypatch
) -> None:
    """Reading an exit costs more than the whole model: full depth is what is certified."""
    model = AdaptiveModel.from_pretrained(checkpoint)
    plain = tiny_cost(model)
    dear = replace(plain, reads=(WarmCost(PassCost(1.0)),) * len(plain.reads))
    monkeypatch.setattr(cost_measure, "cached_cost", lambda *_args, **_kwargs: dear)
    cfg = calibration_config(
        [f"recording={run.path.parent / 'recording.npz'}", f"model={checkpoint}",
         "costs=measured", f"out={tmp_path / 'o'}"]
    )  # fmt: skip
    found = calibrate(cfg, progress=False)
    (certificate,) = Calibration.load(tmp_path / "o").certificates
    assert math.isinf(certificate.lambda_) and set(certificate.thresholds) == {math.inf}
    assert any("no exit pays" in note for note in found.notes)
    model.set_calibration(tmp_path / "o")
    first, last = certificate.conditions["prompt_ends"]
    ids = torch.tensor([[*first, 5, 6, 7, *last]])
    how = {"max_new_tokens": 6, "return_dict_in_generate": True}
    out = model.generate(ids, fidelity="certified", risk="token", **how)
    dense = model.generate(ids, fidelity="dense", **how)
    assert out.batch.reads == [] and out.sequences.tolist() == dense.sequences.tolist()


def test_a_certificate_of_accuracy_over_a_model_that_solves_nothing_warns(run):
    assert any("dense solves 0 of 30" in note and "says nothing" in note for note in run.notes)
