"""An interrupted evaluation or calibration goes on where it was, and says that it did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from random_checkpoint import save_checkpoint
from tiny_calibration import tiny_calibration

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import Calibration
from deliberate.calibration.exit_traces import Recording
from deliberate.cli import app as cli
from deliberate.eval.calibrate import traces
from deliberate.eval.calibrate.command import calibrate, calibration_config
from deliberate.eval.runner import batched
from deliberate.eval.runner import command as app
from deliberate.eval.runner.partial_file import AnswerLog, PartialFile
from deliberate.eval.runner.results import PARTIAL_FILE, read_results
from deliberate.eval.runner.runner import Runner
from deliberate.eval.tasks.registry import evaluation_config
from deliberate.policies.drift import DriftMonitor
from deliberate.utils.command_errors import INTERRUPTED
from deliberate.utils.errors import DeliberateError, Interrupted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    tiny_calibration(AdaptiveModel.from_pretrained(folder)).save(folder / "calibration.json")
    return folder


# -- the file --------------------------------------------------------------------------------------


def kept(path: Path, settings: dict, resume: str | bool = "auto") -> list[dict]:
    with PartialFile(path, settings, resume) as partial:
        return partial.lines


def filled(path: Path, settings: dict, count: int = 3) -> None:
    with PartialFile(path, settings) as partial:
        for number in range(count):
            partial.append({"number": number})


def test_a_file_of_the_same_settings_is_gone_on_from(tmp_path) -> None:
    path = tmp_path / "new" / "p.jsonl"
    filled(path, {"a": 1})
    filled(path, {"a": 1}, 1)
    assert [line["number"] for line in kept(path, {"a": 1})] == [0, 1, 2, 0]


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path, cut) -> None:
    path = tmp_path / "p.jsonl"
    filled(path, {"a": 1})
    path.write_bytes(path.read_bytes()[:-cut])
    filled(path, {"a": 1}, 1)
    assert [line["number"] for line in kept(path, {"a": 1})] == [0, 1, 0]


def test_a_line_damaged_in_the_middle_is_named(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    filled(path, {"a": 1})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "[1", *lines[2:]]) + "\n")
    with pytest.raises(DeliberateError, match=r"p\.jsonl line 2 is damaged: resume=false"):
        kept(path, {"a": 1})
    assert kept(path, {"a": 1}, resume=False) == []


def test_other_settings_start_anew_and_lose_nothing(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    filled(path, {"a": {"b": 1}, "c": 2})
    with PartialFile(path, {"a": {"b": 3}, "c": 2}) as partial:
        assert partial.lines == []
        assert "a.b 1 instead of 3" in partial.notice and str(tmp_path) in partial.notice
        partial.append({"other": True})
    # back at the first settings, their file is found again
    assert len(kept(path, {"a": {"b": 1}, "c": 2})) == 3
    assert len(kept(path, {"a": {"b": 3}, "c": 2})) == 1


def test_resuming_can_be_demanded_or_declined(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(DeliberateError, match=r"resume=true: .* does not exist"):
        PartialFile(path, {"a": 1}, True)
    filled(path, {"a": 1})
    with pytest.raises(DeliberateError, match="is of other settings: a 1 instead of 2"):
        PartialFile(path, {"a": 2}, True)
    assert len(kept(path, {"a": 1}, True)) == 3
    assert kept(path, {"a": 1}, False) == []
    with pytest.raises(DeliberateError, match="resume=maybe is not one of auto, true, false"):
        PartialFile(path, {"a": 1}, "maybe")


def test_a_file_of_an_earlier_release_or_of_nobody_is_set_aside(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    for text in ('{"id": "words-1"}\n', "", "\x00\x01", "[" * 50_000):
        path.write_text(text)
        assert kept(path, {"a": 1}) == []
        assert (tmp_path / "p.old.jsonl").read_text() == text


def test_two_runs_do_not_write_one_file(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    for resume in ("auto", False):
        with PartialFile(path, {"a": 1}) as partial:
            partial.append({"number": 0})
            with pytest.raises(DeliberateError, match="another run is writing"):
                PartialFile(path, {"a": 1}, resume)
        assert len(kept(path, {"a": 1})) > 0


def test_a_run_that_kept_nothing_leaves_nothing(tmp_path) -> None:
    assert kept(tmp_path / "p.jsonl", {"a": 1}) == []
    assert list(tmp_path.iterdir()) == []


def test_batches_are_decoded_once(tmp_path) -> None:
    decoded = []

    def decode():
        decoded.append(1)
        return [(1, 2), (3,)]

    for _ in range(2):
        with PartialFile(tmp_path / "p.jsonl", {"a": 1}) as partial:
            log = AnswerLog(partial, "full depth")
            assert log.take([5, 7], decode) == log.take([5, 7], decode) == [(1, 2), (3,)]
    assert len(decoded) == 1
    with PartialFile(tmp_path / "p.jsonl", {"a": 1}) as partial:
        AnswerLog(partial, "thresholds [0.5]").take([5, 7], decode)
    assert len(decoded) == 2


# -- eval ------------------------------------------------------------------------------------------


def evaluation(checkpoint: Path, out: Path, *overrides: str):
    cfg = evaluation_config(["task.size=6", "task.max_new_tokens=16", "device=cpu", "warmup=0"])
    given = {"model": str(checkpoint), "out": str(out), "executor": "generic"}
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)), given)


def stop_after(monkeypatch, calls: int) -> list[str]:
    """Ctrl-C at a decode; returns the modes decoded, filled as they are."""
    decode, seen = Runner.decode, []

    def interrupted(self, prompt, mode):
        seen.append(mode)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return decode(self, prompt, mode)

    monkeypatch.setattr(Runner, "decode", interrupted)
    return seen


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_answers(
    checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    whole = app.evaluate(evaluation(checkpoint, tmp_path / "whole", "modes=[dense,threshold]"),
                         progress=False).result  # fmt: skip
    out = tmp_path / "out"
    cfg = evaluation(checkpoint, out, "modes=[dense,threshold]")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted, match=r"2 of 6 problems .* the same command goes on"):
            app.evaluate(cfg, progress=False)
    with pytest.raises(DeliberateError, match="holds an unfinished run"):
        read_results(out)
    page = (out / app.PARTIAL_REPORT).read_text()
    assert "Partial: 2 of 6 problems" in page and "(partial)" in page
    partial = out / PARTIAL_FILE
    partial.write_bytes(partial.read_bytes()[:-7])  # a kill in the middle of a line
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 99)
        result = app.evaluate(cfg, progress=False).result
    assert len(seen) == 2 * 5 and "going on after 1 of 6 problems" in capsys.readouterr().err
    found, records = read_results(out)
    assert found == result and len(records) == 6 and "(partial)" not in found.name
    _, reference = read_results(tmp_path / "whole")
    assert [r.id for r in records] == [r.id for r in reference]
    for own, other in zip(records, reference, strict=True):
        assert own.modes["threshold"].tokens == other.modes["threshold"].tokens
    assert any("interrupted and went on: 1 problems from" in note for note in result.notes)
    assert result.config_sha256 == whole.config_sha256 and whole.notes[:0] == []
    names = {"problems.jsonl", "results.json", "report.html"}
    assert {path.name for path in out.iterdir()} == names


def test_other_settings_do_not_go_on_from_it(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(app, "write_report", lambda folder, _runs, **_: folder / "r.html")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            app.evaluate(evaluation(checkpoint, tmp_path, "modes=[dense]"), progress=False)
    changed = evaluation(checkpoint, tmp_path, "modes=[dense]", "task.max_new_tokens=8")
    with pytest.raises(DeliberateError, match=r"task\.max_new_tokens 16 instead of 8"):
        app.evaluate(OmegaConf.merge(changed, {"resume": True}), progress=False)
    app.evaluate(changed, progress=False)
    _, records = read_results(tmp_path)
    assert max(len(r.modes["dense"].tokens) for r in records) <= 8


def test_the_drift_monitor_goes_on_with_what_it_had_seen(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(app, "write_report", lambda folder, _runs, **_: folder / "r.html")
    cfg = evaluation(
        checkpoint, tmp_path, "modes=[certified]", "task.max_new_tokens=24", "warmup=2"
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            app.evaluate(cfg, progress=False)
    before = json.loads((tmp_path / PARTIAL_FILE).read_text().splitlines()[-1])["drift"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)  # the warm-up alone, which had been counted before
        with pytest.raises(Interrupted):
            app.evaluate(cfg, progress=False)
    assert before["answers"] > 0
    after = app.evaluate(cfg, progress=False).result.certified
    assert after.answers >= before["answers"] and after.tokens >= before["tokens"]
    assert after.answers <= before["answers"] + 1


def test_a_snapshot_of_a_drift_monitor_restores_it() -> None:
    before, after = DriftMonitor(0.1), DriftMonitor(0.1)
    for disagreements in (0, 3, 9):
        before.update(disagreements, 10)
    after.restore(json.loads(json.dumps(before.snapshot())))
    assert after.update(5, 10) == before.update(5, 10)
    for wrong in ({}, {**before.snapshot(), "sums": [1.0]}, {**before.snapshot(), "tokens": "x"}):
        with pytest.raises(DeliberateError, match="snapshot"):
            after.restore(wrong)


# -- calibrate -------------------------------------------------------------------------------------


SETTINGS = ("size=60", "batch=10", "task.steps=[1,2]", "task.max_new_tokens=20", "costs=layers",
            "device=cpu", "epsilon=0.5", "executor=generic")  # fmt: skip


def calibration(checkpoint: Path, out: Path, *overrides: str):
    return calibration_config([f"model={checkpoint}", f"out={out}", *SETTINGS, *overrides])


def test_an_interrupted_calibration_goes_on_and_gives_the_same_file(
    checkpoint, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    cfg = calibration(checkpoint, out)
    reference = calibrate(calibration(checkpoint, tmp_path / "whole"), progress=False)
    generate, record = AdaptiveModel.generate, traces.record_sequences
    calls: list[str] = []
    stop = [0]

    def decoding(self, *arguments, **settings):
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        calls.append(str(settings["fidelity"]))
        return generate(self, *arguments, **settings)

    def recording(*arguments, **settings):
        calls.append("record")
        return record(*arguments, **settings)

    monkeypatch.setattr(AdaptiveModel, "generate", decoding)
    monkeypatch.setattr(traces, "record_sequences", recording)
    done: list[str] = []
    for stop[0] in (4, 5):  # while decoding at full depth, then while certifying accuracy
        with pytest.raises(Interrupted, match="the same command goes on from there"):
            calibrate(cfg, progress=False)
        done, calls[:] = done + calls, []
    stop[0] = -1
    found = calibrate(cfg, progress=False)
    done += calls
    # six batches at full depth, one record: nothing was done twice
    assert done.count("dense") == 6 and done.count("record") == 1
    tested = len(reference.testing["accuracy"].tests)
    assert done.count("threshold") == 3 * tested
    assert found.calibration.policy == reference.calibration.policy
    assert found.calibration.certificates[0].thresholds == (
        reference.calibration.certificates[0].thresholds
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json", "recording.npz", "reliability.png", "reliability.svg",
    ]  # fmt: skip
    same = [Recording.load(folder / "recording.npz") for folder in (out, tmp_path / "whole")]
    np.testing.assert_array_equal(same[0].scores, same[1].scores)
    assert Calibration.load(out) == found.calibration


def test_a_calibration_that_kept_nothing_is_just_stopped(
    checkpoint, tmp_path, monkeypatch, capsys
) -> None:
    def stopped(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(batched, "plain_greedy", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", f"model={checkpoint}", f"out={tmp_path / 'o'}", *SETTINGS])
    assert ended.value.code == INTERRUPTED and "interrupted" not in capsys.readouterr().err
    assert list((tmp_path / "o").iterdir()) == []
