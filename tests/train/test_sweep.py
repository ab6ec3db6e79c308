"""Sweeps: resumed, never overwritten, and failed jobs named."""

from __future__ import annotations

import json

import pytest
from random_checkpoint import save_checkpoint

from deliberate.train import app
from deliberate.train.app import main
from deliberate.train.overrides import first_job, is_sweep
from deliberate.utils.errors import DeliberateError

SETTINGS = [
    "recipe=heads", "model=folder", "data=words", "data.max_tokens=150", "trainer=finetune",
    "trainer.max_steps=2", "trainer.tokens_per_step=300", "trainer.micro_batches=2",
    "trainer.warmup_steps=1", "trainer.log_every=1", "trainer.save_every=1",
    "trainer.bf16=false", "trainer.target_agreement=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def sweep(stock, tmp_path):
    def start(*overrides):
        where = [f"model.path='{stock}'", f"output_dir='{tmp_path / 'sweep'}'"]
        main(["--multirun", *SETTINGS, *where, *overrides])

    return tmp_path / "sweep", start


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def failing(monkeypatch, *seeds):
    """Jobs of these seeds fail in the middle of their training."""
    original = app.AdaptiveTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.args.seed in seeds and self.state.global_step == 1:
            raise FloatingPointError("it came to nothing\nand more")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(app.AdaptiveTrainer, "compute_loss", compute_loss)


def test_a_sweep_is_never_overwritten(sweep):
    folder, start = sweep
    start("seed=0,1")
    before = contents(folder)
    for again, message in (
        (["seed=2,3"], "already holds a sweep"),
        (["seed=0,1"], "already holds a sweep"),
        (["seed=2,3", "resume=true"], r"holds another sweep \(.*seed=0,1"),
    ):
        with pytest.raises(DeliberateError, match=message) as error:
            start(*again)
        assert "\n" not in str(error.value)
        assert contents(folder) == before


def test_a_failed_job_is_named_and_does_not_end_the_sweep(sweep, monkeypatch, capsys):
    folder, start = sweep
    with monkeypatch.context() as patch:
        failing(patch, 1)
        with pytest.raises(DeliberateError, match=r"1 of 3 jobs failed") as error:
            start("seed=0,1,2")
    assert f"in {folder}: job 1 (seed=1): " in str(error.value)
    assert "FloatingPointError: it came to nothing; the same command" in str(error.value)
    assert [(folder / n / "run.json").is_file() for n in "012"] == [True, False, True]
    assert json.loads((folder / "1" / "failed.json").read_text())["error"].startswith("Floating")
    table = (folder / "comparison.md").read_text()
    assert "failed: job 1 (seed=1): Floating" in table and "\n| 0 |" in table
    # The same command resumes: finished jobs are not run again, the failed one continues.
    finished = {name: (folder / name / "run.json").stat().st_mtime_ns for name in "02"}
    capsys.readouterr()
    start("seed=0,1,2", "resume=true")
    out = capsys.readouterr().out
    assert "job 0 is finished: skipped" in out and "job 2 is finished: skipped" in out
    assert {n: (folder / n / "run.json").stat().st_mtime_ns for n in "02"} == finished
    record = json.loads((folder / "1" / "run.json").read_text())
    assert (record["resumed_from"], record["steps"]) == ("checkpoint-1", 2)
    assert not (folder / "1" / "failed.json").exists()
    assert "failed" not in (folder / "comparison.md").read_text()


def test_a_job_that_cannot_work_is_named_too(sweep, capsys):
    folder, start = sweep
    with pytest.raises(DeliberateError, match=r"job 0 \(data\.max_tokens=9000\)"):
        start("data.max_tokens=9000,150")
    assert (folder / "1" / "run.json").is_file()


def test_a_sweep_of_which_no_job_could_train_may_be_put_right(sweep):
    folder, start = sweep
    start("data.max_tokens=150", "debug=dry_run", "seed=0,1")
    with pytest.raises(DeliberateError, match="3 of 3 jobs failed"):
        start("data.max_tokens=9000", "seed=0,1,2")
    start("seed=0")
    assert (folder / "0" / "run.json").is_file()
    assert "failed" not in (folder / "comparison.md").read_text()


def test_a_command_line_is_read_as_hydra_reads_it():
    assert is_sweep(["-m", "seed=1,2"]) and is_sweep(["seed=1,2", "--multirun"])
    assert not is_sweep(["seed=1"]) and not is_sweep(["-m", "--cfg", "job"])
    arguments = [
        "-m",
        "seed=3,4",
        "exits.layers=[1,2],[2]",
        "+experiment=heads",
        "output_dir='a,b'",
    ]
    assert first_job(arguments) == [
        "seed=3", "exits.layers=[1,2]", "+experiment=heads", "output_dir='a,b'"
    ]  # fmt: skip
