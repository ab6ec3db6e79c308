"""The modes `certified` and `budget` of an evaluation: what is run, recorded, noted and shown."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from random_checkpoint import LAYERS, save_checkpoint
from synthetic_runs import make_records, make_result
from tiny_calibration import tiny_calibration, use_tiny_cost

from deliberate.api.model import AdaptiveModel
from deliberate.cli import app as cli
from deliberate.config import Fidelity
from deliberate.eval.report.guarantee_text import budget_facts, certified_facts, guarantee_lines
from deliberate.eval.report.numbers import statements
from deliberate.eval.report.page import render_report
from deliberate.eval.runner import command
from deliberate.eval.runner.guarantee_check import GuaranteeCheck, expected_disagreement
from deliberate.eval.runner.guarantees import BudgetInfo, CertifiedInfo
from deliberate.eval.runner.outcomes import BudgetOutcome
from deliberate.eval.runner.results import read_results, write_results
from deliberate.eval.tasks.registry import evaluation_config
from deliberate.policies import guarantees
from deliberate.trace import GenerationTrace, TokenRecord
from deliberate.utils.errors import DeliberateError

NEW_TOKENS = 24
AMPLE = "budget.ms_per_token=1e5"
BOTH = "fidelity=[dense,exact,certified,budget]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint) -> AdaptiveModel:
    return AdaptiveModel.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """A calibration's."""
    made = tmp_path_factory.mktemp("calibration")
    tiny_calibration(model).save(made / "calibration.json")
    return made


@pytest.fixture
def evaluate(checkpoint, model, folder, tmp_path, monkeypatch):
    use_tiny_cost(monkeypatch, model)
    monkeypatch.setattr(command, "write_report", lambda path, _runs, **_: path / "report.html")
    defaults = evaluation_config(["task.size=6", f"task.max_new_tokens={NEW_TOKENS}", "device=cpu"])

    def call(*overrides: str):
        given = {"model": str(checkpoint), "out": str(tmp_path / "out")}
        if not any(o.startswith("calibration=") for o in overrides):
            given["calibration"] = str(folder)
        cfg = OmegaConf.merge(defaults, OmegaConf.from_dotlist(list(overrides)), given)
        return command.evaluate(cfg, progress=False).result

    return call


def test_all_fidelities_are_run_recorded_and_read_back(evaluate, tmp_path) -> None:
    result = evaluate(BOTH, AMPLE)
    assert list(result.modes) == ["dense", "exact", "certified", "budget"]
    assert result.config["modes"] == list(result.modes) and result.config["fidelity"] is None
    certified, held = result.certified, result.modes["budget"].budget
    assert certified.epsilon == 0.1 and certified.departures == [] and certified.answers > 0
    assert set(result.modes["certified"].exit_histogram) != {LAYERS}
    assert result.modes["certified"].versus_dense.problems == result.modes["certified"].total
    assert held.total == held.within == held.within_whole == 6 and held.guarded == 0
    assert "is met at full depth" in result.budget.feasibility and result.budget.refused == 0
    found, records = read_results(tmp_path / "out")
    assert found == result
    for record in records:
        own = record.modes["budget"]
        assert own.budget.allowed_seconds == pytest.approx(100.0 * len(own.tokens))
        assert record.modes["dense"].budget is None


def test_drafts_are_counted_where_exact_mode_decodes_for_a_certificate(
    evaluate, tmp_path, monkeypatch
) -> None:
    chosen = lambda *_, **__: (Fidelity.EXACT, "")  # noqa: E731
    monkeypatch.setattr(guarantees, "faster_member", chosen)
    result = evaluate("fidelity=[dense,certified,threshold]", "thresholds=0.01")
    own = result.modes
    assert own["certified"].versus_dense.identical == 6 and own["dense"].acceptance_rate is None
    assert 0 <= own["certified"].acceptance_rate < 1  # of a random model
    assert own["threshold"].acceptance_rate is None
    found, records = read_results(tmp_path / "out")
    assert found == result and any(r.modes["certified"].rejected for r in records)
    assert not any(r.modes["threshold"].drafted for r in records)
    page = render_report([(found, records)])
    assert "drafts rejected" in page and "tokens exited early, none verified" in page


def test_modes_and_fidelity_are_two_names_of_one_setting(evaluate) -> None:
    same = [evaluate(f"{name}=[dense,exact]", "warmup=0") for name in ("modes", "fidelity")]
    assert same[0].config_sha256 == same[1].config_sha256
    assert same[0].certified is None and same[0].budget is None
    with pytest.raises(DeliberateError, match="two names of one setting"):
        evaluate("modes=[dense]", "fidelity=[exact]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modes=[budget]"], r"needs budget\.ms_per_token, budget\.deadline_ms or budget\.tier"),
        (["modes=[dense]", AMPLE], "'budget' is not one of the modes"),
        (["modes=[budget]", AMPLE, "budget.tier=L1"], "ms_per_token and tier are given"),
        (["modes=[budget]", "budget.tier=L9"], "tier 'L9' is unknown"),
        (["modes=[budget]", "budget.ms_per_token=0"], "ms_per_token = 0"),
        (["modes=[budget]", "budget.deadline_ms=-3"], "deadline_ms = -3"),
        (["modes=[budget]", "budget.ms_per_token=.nan"], "ms_per_token = nan"),
        (["modes=[budget]", "budget.ms_per_token=0.01"], "cannot be met: the least possible"),
        (["modes=[certified]", "epsilon=2"], "epsilon=2"),
        (["modes=[certified]", "delta=0"], "delta=0"),
        (["modes=[certified]", "risk=speed"], "risk=speed is not one of token, accuracy"),
        (["modes=[dense]", "epsilon=0.1"], "'certified' is not one of the modes"),
        (["modes=[certified]", "epsilon=0.001"], "no certificate for risk accuracy"),
        (["fidelity=certified"], r"must be a list: fidelity="),
        (["modes=[certified]", "calibration=gone"], "gone is missing"),
    ],
)
def test_a_guarantee_that_cannot_be_given_is_named_before_anything_is_written(
    evaluate, tmp_path, overrides, message
) -> None:
    with pytest.raises(DeliberateError, match=message) as caught:
        evaluate(*overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_without_calibration_is_refused(evaluate, checkpoint, tmp_path) -> None:
    cfg = evaluation_config([f"model={checkpoint}", f"out={tmp_path / 'o'}", "modes=[certified]"])
    with pytest.raises(DeliberateError, match="the model has no calibration"):
        command.evaluate(cfg, progress=False)


def test_a_problem_whose_budget_nothing_could_meet_is_left_out_and_counted(
    evaluate, monkeypatch, tmp_path
) -> None:
    evaluate("modes=[dense]", "warmup=0")
    middle = statistics.median(r.prompt_tokens for r in read_results(tmp_path / "out")[1])
    feasibility = GuaranteeCheck.feasibility

    def strict(self, prompt_tokens, limit):
        found = feasibility(self, prompt_tokens, limit)
        return replace(found, feasible=prompt_tokens < middle)

    monkeypatch.setattr(GuaranteeCheck, "feasibility", strict)
    result = evaluate("modes=[dense,budget]", AMPLE, "warmup=1")
    refused = result.budget.refused
    assert 0 < refused < 6 and result.modes["budget"].total == 6 - refused
    assert result.modes["dense"].total == 6
    assert any(f"refused before decoding on {refused} of 6" in note for note in result.notes)


def test_a_certificate_that_expires_ends_the_mode_and_not_the_run(
    evaluate, model, folder, tmp_path
) -> None:
    strict = tmp_path / "strict"
    strict.mkdir()
    tiny_calibration(model, disagreement=0.001).save(strict / "calibration.json")
    result = evaluate(f"calibration={strict}", "fidelity=[dense,certified]", "task.size=12")
    assert result.certified.alarm and 0 < result.modes["certified"].total < 12
    assert result.modes["dense"].total == 12
    assert any("certificate expired during the run" in note for note in result.notes)
    found = {mode: (text, tone) for mode, text, tone in statements(result)}
    assert "expired by drift" in found["certified"][0] and found["certified"][1] == "bad"


def test_conditions_of_the_certificate_that_the_run_does_not_keep_are_noted(evaluate) -> None:
    result = evaluate("modes=[certified]", "task.max_new_tokens=20")
    assert result.certified.departures == ["max_new_tokens 20 instead of 24"]
    assert any("guarantees nothing for this run: max_new_tokens 20" in n for n in result.notes)
    assert any("exits decoded by themselves" in note for note in result.notes)
    assert evaluate("modes=[certified]").certified.departures == []


def test_expected_disagreement_is_the_mean_doubt_of_the_tokens_that_left(model, folder) -> None:
    model.set_calibration(folder)
    doubt = [1 - float(model.calibration.probability(k, [s])[0]) for k, s in ((0, 0.3), (1, 0.8))]
    records = [
        TokenRecord(1, layer, score, 0.0, False)
        for layer, score in ((1, 0.3), (2, 0.8), (LAYERS, 0.1), (LAYERS, float("nan")))
    ]
    trace = GenerationTrace(LAYERS, 5, records)
    assert expected_disagreement(model, trace) == pytest.approx(sum(doubt) / 4)


# -- the report ------------------------------------------------------------------------------------

INFO = CertifiedInfo(
    risk="accuracy", epsilon=0.01, delta=0.05, n=900, observed=0.002, price=0.3,
    thresholds=[0.9, None], weights="aa" * 32, exits="bb" * 32, policy="cc" * 32, data="dd" * 32,
    conditions={"task": "words"}, departures=[], limit=0.004, answers=40, tokens=800,
    disagreements=1, evidence=2.0, alarm_at=1e4, alarm=False,
)  # fmt: skip
BUDGET = BudgetInfo("2 ms per token", "it can be met", True, False, False, 1.2, 3)


def guaranteed_run(**changes):
    """Synthetic records with certified = exact's answers and budget = threshold's."""

    def outcome(record, index):
        held = BudgetOutcome(index % 10 != 0, index % 5 != 0, 1.0, 0.002, 1, 1.1)
        return replace(record.modes["threshold"], budget=held)

    records = [
        replace(
            record,
            modes={
                "dense": record.modes["dense"],
                "certified": record.modes["exact"],
                "budget": outcome(record, index),
            },
        )
        for index, record in enumerate(make_records(40))
    ]
    return make_result(records, **({"certified": INFO, "budget": BUDGET} | changes)), records


def test_the_report_states_guarantee_paired_difference_drift_and_share_within_budget() -> None:
    result, records = guaranteed_run()
    certified = {name: (value, tone) for name, value, tone in certified_facts(result)}
    assert "ε = 1.0 %" in certified["Guarantee"][0] and "95.0 %" in certified["Guarantee"][0]
    assert "900 testing problems" in certified["Guarantee"][0]
    assert "weights aaaaaaaaaaaa, exits bbbbbbbbbbbb" in certified["Bound to"][0]
    assert "McNemar" in certified["In this run"][0] and "[" in certified["In this run"][0]
    assert certified["Drift"][0].startswith("no alarm: 1 of 800")
    held = {name: (value, tone) for name, value, tone in budget_facts(result)}
    assert held["Within the budget"][0].startswith("36 of 40 answers, 90.0 %")
    assert "32 by the wall clock" in held["Within the budget"][0]
    assert held["Within the budget"][1] == "warn" and "0.20%" in held["Estimated risk"][0]
    assert held["Refused before decoding"][0] == "3 problems"
    page = render_report([(result, records)])
    for facts in (certified, held):
        for value, _ in facts.values():
            assert value.replace("'", "&#39;") in page
    assert [line.split(":")[0] for line in guarantee_lines(result)] == ["certified", "budget"]


def test_more_problems_lost_than_guaranteed_is_called_broken() -> None:
    result, records = guaranteed_run()
    wrong = [
        replace(r, modes=r.modes | {"certified": replace(r.modes["certified"], correct=False)})
        for r in records
    ]
    lost = make_result(wrong, certified=INFO, budget=BUDGET)
    facts = {name: (value, tone) for name, value, tone in certified_facts(lost)}
    assert "the guarantee is not met" in facts["Its risk in this run"][0]
    assert facts["Its risk in this run"][1] == "bad"
    kept = {name: value for name, value, _ in certified_facts(result)}
    assert "do not settle" in kept["Its risk in this run"], "none of 40 is no proof of 1 %"
    alarmed = make_result(records, certified=replace(INFO, alarm=True), budget=BUDGET)
    tones = {name: tone for name, _, tone in certified_facts(alarmed)}
    assert tones["Drift"] == "bad"


def test_results_of_earlier_releases_load_and_runs_without_guarantees_look_like_theirs(
    tmp_path,
) -> None:
    records = make_records(4)
    result = make_result(records)
    write_results(tmp_path, result, records)
    raw = json.loads((tmp_path / "results.json").read_text())
    assert "certified" not in raw and "budget" not in raw
    assert all("budget" not in summary for summary in raw["modes"].values())
    assert "budget" not in (tmp_path / "problems.jsonl").read_text()
    found, _ = read_results(tmp_path)
    assert found.certified is None and found.modes["exact"].budget is None
    assert certified_facts(found) == [] and budget_facts(found) == []
    guaranteed, records = guaranteed_run()
    write_results(tmp_path, guaranteed, records)
    assert read_results(tmp_path) == (guaranteed, records)


# -- generate --------------------------------------------------------------------------------------


@pytest.fixture
def generate(checkpoint, model, folder, monkeypatch, capsys):
    use_tiny_cost(monkeypatch, model)

    def call(*options: str) -> tuple[int, str, str]:
        given = ("generate", "How many?", "--model", str(checkpoint), "--max-new-tokens", "15")
        with pytest.raises(SystemExit) as ended:
            cli.main([*given, *options, "--calibration", str(folder)])
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out, found.err

    return call


def test_generate_holds_a_budget_and_says_whether_it_was_met(generate) -> None:
    for options in (["--budget-ms", "10000"], ["--fidelity", "budget", "--tier", "L3"]):
        status, out, err = generate(*options)
        assert status == 0, err
        assert "met, " in out and "chosen at layer" in out
    assert "deadline of 1000 ms: met" in out


def test_generate_certified_exits_early(generate) -> None:
    status, out, err = generate("--fidelity", "certified", "--risk", "token", "--epsilon", "0.2")
    assert status == 0, err
    assert "chosen at layer 1: " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fidelity", "budget"], "needs --budget-ms, --deadline-ms or --tier"),
        (["--fidelity", "exact", "--tier", "L1"], "it needs fidelity 'budget'"),
        (["--budget-ms", "0"], "ms_per_token = 0.0 is impossible"),
        (["--budget-ms", "-1"], "ms_per_token = -1.0"),
        (["--budget-ms", "nan"], "ms_per_token = nan"),
        (["--tier", "L7"], "tier 'L7' is unknown; there is L1 (50 ms)"),
        (["--budget-ms", "0.001"], "cannot be met: the least possible"),
        (["--epsilon", "0.1"], "it needs 'certified'"),
        (["--fidelity", "certified", "--risk", "luck"], "risk 'luck'"),
        (["--fidelity", "certified", "--epsilon", "0.001"], "no certificate"),
    ],
)
def test_a_guarantee_that_generate_cannot_give_is_one_line_with_status_2(
    generate, options, message
) -> None:
    status, out, err = generate(*options)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
