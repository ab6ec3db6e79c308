"""Where results cannot be written, one line says so before anything is measured."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import pytest
from random_checkpoint import save_checkpoint
from tiny_calibration import tiny_cost

from deliberate.api.model import AdaptiveModel
from deliberate.cli import app as cli
from deliberate.cost.cache import keep, recall
from deliberate.eval.benchmarks.settings import BENCHES, run_benchmark
from deliberate.eval.calibrate.command import calibrate, calibration_config
from deliberate.eval.runner import command
from deliberate.eval.tasks.registry import evaluation_config
from deliberate.utils.command_errors import MISTAKE
from deliberate.utils.errors import DeliberateError
from deliberate.utils.folders import output_file, output_folder


@pytest.fixture
def blocked(tmp_path, monkeypatch) -> Path:
    """A path below a file, and no model that could be loaded before that is noticed."""

    def load(*_args, **_kwargs):
        raise AssertionError("a model is loaded before the output is checked")

    monkeypatch.setattr(AdaptiveModel, "from_pretrained", load)
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "out"


@pytest.mark.parametrize("bench", list(BENCHES))
def test_every_bench_checks_its_output_before_it_measures(bench, blocked) -> None:
    with pytest.raises(DeliberateError, match=r"out=.*file/out: .* is a file, a folder is needed"):
        run_benchmark([bench, f"out={blocked}"])


@pytest.mark.parametrize("bench", ["gate", "budget"])
def test_a_bench_that_needs_an_output_asks_for_it(bench) -> None:
    with pytest.raises(DeliberateError, match="out"):
        run_benchmark([bench, "out="])


def test_eval_and_calibrate_check_theirs(blocked) -> None:
    with pytest.raises(DeliberateError, match="is a file, a folder is needed"):
        command.evaluate(evaluation_config([f"out={blocked}"]), progress=False)
    with pytest.raises(DeliberateError, match="is a file, a folder is needed"):
        calibrate(calibration_config([f"out={blocked}"]), progress=False)


def test_a_report_of_a_run_checks_its_folder(blocked, monkeypatch) -> None:
    monkeypatch.setattr(command, "read_results", lambda _folder: (None, []))
    for out in (None, blocked):
        with pytest.raises(DeliberateError, match="is a file, a folder is needed"):
            command.rebuild_report([blocked], out)


def test_a_place_that_refuses_files_is_named_with_the_reason(tmp_path, monkeypatch) -> None:
    def refuse(**_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("deliberate.utils.folders.tempfile.TemporaryFile", refuse)
    for check in (output_folder, output_file):
        with pytest.raises(DeliberateError, match=r"cannot be written \(Read-only file system\)"):
            check(tmp_path / "new" / "place")
    with pytest.raises(DeliberateError, match="cannot be written"):
        output_folder(tmp_path / ("x" * 300))
    with pytest.raises(DeliberateError, match="out has no value"):
        output_folder(None)


def test_a_check_leaves_nothing_behind(tmp_path) -> None:
    output_folder(tmp_path / "a" / "b")
    output_file(tmp_path / "c" / "d.json")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "report.html"))

    monkeypatch.setattr(command, "rebuild_report", full)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == MISTAKE and len(lines) == 1
    assert "No space left on device" in lines[0] and "report.html" in lines[0]


def test_a_cost_model_that_cannot_be_kept_is_used_and_said(tmp_path) -> None:
    model = AdaptiveModel.from_pretrained(save_checkpoint(tmp_path / "model"))
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="measured but not kept: .*DELIBERATE_CACHE"):
        assert keep(tiny_cost(model), tmp_path / "file" / "cache") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep(tiny_cost(model), tmp_path / "cache").is_file()
    assert recall(tiny_cost(model).fingerprint, tmp_path / "file" / "cache") is None
