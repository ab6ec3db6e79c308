"""The figures of a run: CSV, console line, and the table over a sweep."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
from random_checkpoint import save_checkpoint

from deliberate.train.app import main
from deliberate.train.compare import read_jobs, summarise, table, write_comparison
from deliberate.train.logs import ConsoleLog, CsvLog, format_line

LINE = {
    "loss": 1.25, "learning_rate": 0.004, "grad_norm": 0.5, "epoch": 0.1, "loss/exit10": 1.1,
    "agree/exit10": 1.0, "loss/exit2": 2.5, "agree/exit2": 0.815, "ece/exit2": 0.031,
    "speed_at_99": 1.311, "target_tokens": 99.0,
}  # fmt: skip


def state(step, history=(), first=True):
    return SimpleNamespace(
        is_world_process_zero=first, global_step=step, max_steps=600, log_history=list(history)
    )


def test_the_console_line_goes_through_the_exits_by_depth():
    assert format_line(LINE, 40, 600) == (
        "step 40/600  loss 1.25  lr 0.004  exit2 loss 2.500 agree 81.5% ece 0.031  "
        "exit10 loss 1.100 agree 100.0%  speed@99% 1.31"
    )


def test_the_console_prints_how_long_a_step_takes(capsys):
    times = iter([100.0, 130.0])
    log = ConsoleLog(clock=lambda: next(times))
    log.on_step_begin(None, state(20), None)
    log.on_step_begin(None, state(21), None)
    log.on_log(None, state(40), None, logs=LINE)
    log.on_log(None, state(40, first=False), None, logs=LINE)
    log.on_log(None, state(40), None, logs={"train_runtime": 3.0})
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("  1.50 s/step  14 min left\n")


def test_the_first_steps_print_how_long_the_run_will_take(capsys):
    """The very first is a warm-up and not counted."""
    times = iter([0.0, 10.0, 11.0, 12.0, 13.0])
    log = ConsoleLog(lambda pool: 80 + pool, clock=lambda: next(times), bar=False)
    log.on_step_begin(None, state(0), None)
    for step in (1, 2, 3, 4):
        log.on_step_end(None, state(step), None)
    out = capsys.readouterr().out
    assert out == "estimate: 1 s/step, 82 tokens/s: about 10 min for the 596 steps left\n"


def test_a_slow_first_step_is_enough_for_an_estimate(capsys):
    times = iter([0.0, 147.0])
    log = ConsoleLog(lambda pool: 8192, clock=lambda: next(times), bar=False)
    log.on_step_begin(None, state(0), None)
    log.on_step_end(None, state(1), None)
    assert "147 s/step, 56 tokens/s: about 24 h 28 min for the 599 steps" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_with_the_time_left(capsys):
    times = iter([0.0, 2.0, 4.0])
    with ConsoleLog(lambda pool: 100, clock=lambda: next(times), bar=True) as log:
        log.on_step_begin(None, state(0), None)
        log.on_step_end(None, state(1), None)
        log.on_log(None, state(1), None, logs=LINE)
    shown = capsys.readouterr()
    assert "1/600" in shown.err and "50 tokens/s" in shown.err and "<" in shown.err
    assert "step 1/600" in shown.out


def test_the_csv_starts_anew_from_what_the_checkpoint_remembers(tmp_path):
    log = CsvLog(tmp_path)
    log.on_train_begin(None, state(0), None)
    for step in (1, 2, 3):
        log.on_log(None, state(step), None, logs=LINE | {"loss": step / 2})
    log.on_log(None, state(3), None, logs={"train_runtime": 3.0})
    whole = log.path.read_text()
    rows = list(csv.DictReader(whole.splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0])[:4] == ["step", "loss", "learning_rate", "grad_norm"]
    log.path.write_text(whole + "3,0.1")  # torn where the run was killed
    history = [LINE | {"loss": step / 2, "step": step} for step in (1, 2)]
    again = CsvLog(tmp_path)
    again.on_train_begin(None, state(2, history), None)
    # A figure that the first line does not have is left out, not written into a wrong column.
    again.on_log(None, state(3), None, logs=LINE | {"loss": 1.5, "agree/exit3": 0.5})
    assert again.path.read_text() == whole


def record(folder, number, *, seed, loss, layers="auto", speed=1.2):
    path = folder / str(number)
    path.mkdir(parents=True)
    line = {"loss": loss, "speed_at_99": speed, "loss/exit2": loss + 1, "agree/exit2": 0.5}
    content = {
        "overrides": ["recipe=heads", f"seed={seed}", f"exits.layers={layers}"],
        "seed": seed,
        "seconds": 10.0,
        "history": [line | {"loss/exit1": 9.0}, line, {"train_runtime": 3.0}],
    }
    (path / "run.json").write_text(json.dumps(content))


def test_a_sweep_is_summarised_by_setting_over_its_seeds(tmp_path):
    record(tmp_path, 0, seed=0, loss=2.0)
    record(tmp_path, 1, seed=1, loss=4.0)
    record(tmp_path, 2, seed=0, loss=1.0, layers="[1,3]")
    record(tmp_path, 10, seed=1, loss=1.0, layers="[1,3]")
    (tmp_path / "3").mkdir()  # a job that failed
    jobs = read_jobs(tmp_path)
    assert [job.name for job in jobs] == ["0", "1", "2", "10"]
    assert jobs[0].settings == "exits.layers=auto" and jobs[0].figures["loss/exit1"] == 9.0
    auto, other = summarise(jobs)
    assert auto["seeds"] == [0, 1] and auto["mean"]["loss"] == 3.0
    assert auto["standard_deviation"]["loss"] == pytest.approx(2**0.5)
    assert other["settings"] == "exits.layers=[1,3]" and other["standard_deviation"]["loss"] == 0
    text = table(jobs)
    assert "| exits.layers=auto | 2 | 3 ± 1.414 |" in text
    assert text.count("\n| 1") == 2  # jobs 1 and 10
    assert write_comparison(tmp_path) == text == (tmp_path / "comparison.md").read_text()
    assert len(json.loads((tmp_path / "comparison.json").read_text())["jobs"]) == 4


def test_nothing_is_written_where_no_job_ended(tmp_path):
    assert write_comparison(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_sweep_over_exits_and_seeds_ends_with_its_table(tmp_path, capsys):
    stock = save_checkpoint(tmp_path / "stock")
    for name in ("adaptive_config.json", "exits.safetensors"):
        (stock / name).unlink()
    main([
        "--multirun", "recipe=heads", "model=folder", f"model.path='{stock}'", "data=words",
        "data.max_tokens=150", "trainer.max_steps=1", "trainer.tokens_per_step=600",
        "trainer.bf16=false", "trainer.target_agreement=null", f"output_dir='{tmp_path / 'sweep'}'",
        "seed=0,1", "exits.layers=[1],[1,2]",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "comparison: " in out and "| exits.layers=[1,2] | 2 |" in out
    assert len(read_jobs(tmp_path / "sweep")) == 4
