"""Runs that are killed, damaged, started twice or out of disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api.model import AdaptiveModel
from deliberate.train import app, setup
from deliberate.train.app import main, train
from deliberate.train.checkpoints import (
    MANIFEST_NAME,
    all_checkpoints,
    fault,
    newest_intact,
    remove_old,
    seal,
    writing,
)
from deliberate.utils.errors import DeliberateError
from deliberate.utils.file_lock import LOCK_NAME, check_unlocked, locked_folder
from deliberate.utils.hydra_config import compose
from deliberate.utils.json_files import read_json

SETTINGS = [
    "recipe=heads", "model=folder", "data=words", "data.max_tokens=150", "trainer=finetune",
    "trainer.max_steps=4", "trainer.tokens_per_step=400", "trainer.micro_batches=2",
    "trainer.warmup_steps=1", "trainer.log_every=1", "trainer.save_every=1",
    "trainer.bf16=false", "trainer.target_agreement=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def done(stock, tmp_path_factory):
    """A finished run of 4 steps with checkpoints 3 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    train(compose("train", settings(stock, folder)))
    return folder


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def settings(stock, folder, *overrides):
    return [*SETTINGS, f"model.path='{stock}'", f"output_dir='{folder}'", *overrides]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_keeps_its_last_two_checkpoints_sealed(done):
    assert [path.name for path in all_checkpoints(done)] == ["checkpoint-3", "checkpoint-4"]
    assert all(fault(path) is None for path in all_checkpoints(done))
    assert not (done / "saving").exists()


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes of"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes of"),
    "another": (change_a_byte, "another SHA-256"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "exits.safetensors"])
def test_a_damaged_checkpoint_is_skipped_and_named(run, name, kind, capsys):
    damage, words = DAMAGE[kind]
    damage(run / "checkpoint-4" / name)
    assert newest_intact(run, verbose=True) == run / "checkpoint-3"
    out = capsys.readouterr().out
    assert "checkpoint-4 is skipped" in out and name in out and words in out


def test_a_run_resumes_from_the_intact_checkpoint_before_a_damaged_one(stock, done, run):
    os.truncate(run / "checkpoint-4" / "optimizer.pt", 100)
    record = train(compose("train", settings(stock, run, "resume=true")))
    assert record["resumed_from"] == "checkpoint-3"
    expected = AdaptiveModel.from_pretrained(done / "model").state_dict()
    for name, value in AdaptiveModel.from_pretrained(run / "model").state_dict().items():
        assert torch.equal(value, expected[name])
    assert fault(run / "checkpoint-4") is None


def test_a_run_without_an_intact_checkpoint_does_not_start_anew_silently(run):
    for checkpoint in all_checkpoints(run):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(DeliberateError, match=r"no intact checkpoint .*checkpoint-4: optimizer"):
        newest_intact(run)


def test_an_unfinished_checkpoint_is_skipped(run, capsys):
    for checkpoint in all_checkpoints(run):
        (checkpoint / MANIFEST_NAME).unlink()
    assert newest_intact(run, verbose=True) is None
    assert "it was not saved completely" in capsys.readouterr().out
    assert newest_intact(run / "nothing") is None
    (run / "checkpoint-3" / MANIFEST_NAME).write_text('{"files": [1]}')
    with pytest.raises(DeliberateError, match=r"no intact checkpoint .*manifest\.json"):
        newest_intact(run)


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        staged = tmp_path / "saving"
        staged.mkdir()
        (staged / "weights").write_text("w" * step)
        seal(staged, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3" / "weights").unlink()
    remove_old(tmp_path, newest=4)
    assert [p.name for p in all_checkpoints(tmp_path)] == [
        "checkpoint-2", "checkpoint-3", "checkpoint-4"
    ]  # fmt: skip


def test_fewer_steps_than_were_done_are_refused(stock, run):
    before = (run / "config.yaml").read_text()
    with pytest.raises(
        DeliberateError, match=r"max_steps=3 but .*checkpoint-4 has done 4"
    ) as error:
        train(compose("train", settings(stock, run, "resume=changed", "trainer.max_steps=3")))
    one_line(error)
    assert (run / "config.yaml").read_text() == before


def test_an_optimizer_of_another_recipe_is_refused_in_one_line(stock, run):
    with pytest.raises(DeliberateError, match=r"does not fit this run") as error:
        train(compose("train", settings(stock, run, "resume=changed", "recipe=layerskip")))
    one_line(error)


def test_a_folder_has_one_run_at_a_time(stock, run):
    with locked_folder(run):
        for start in (lambda cfg: train(compose("train", cfg)), main):
            with pytest.raises(DeliberateError, match=f"in use by .*process {os.getpid()}"):
                start(settings(stock, run, "resume=true"))
    with locked_folder(run):  # it is free again
        pass
    check_unlocked(run / "elsewhere")
    assert not (run / "elsewhere").exists()


HOLDER = """
import sys, time
from pathlib import Path
from deliberate.utils.file_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_folder_of_a_killed_run_is_unlocked(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(DeliberateError, match=f"process {holder.pid} on"):
        check_unlocked(tmp_path)
    holder.kill()
    holder.wait()
    check_unlocked(tmp_path)
    assert (tmp_path / LOCK_NAME).is_file()


WORKER = """
import os, time
from deliberate.train.distributed.workers import end_with_launcher
end_with_launcher()
with open(os.environ["PIDS"], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(60)
"""
LAUNCHER = """
import sys
from pathlib import Path
from deliberate.utils.file_lock import locked_folder
from deliberate.train.distributed.workers import run_workers
sys.executable = sys.argv[1]
with locked_folder(Path(sys.argv[2])) as lock:
    run_workers(2, [], keeps=[lock])
"""


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_a_killed_launcher_takes_its_workers_with_it(tmp_path):
    pids, script, python = tmp_path / "pids", tmp_path / "worker.py", tmp_path / "python"
    script.write_text(WORKER)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    python.chmod(0o755)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(python), str(tmp_path)],
        env=os.environ | {"PIDS": str(pids)},
        stderr=subprocess.DEVNULL,
    )
    while not pids.exists() or pids.read_text().count("\n") < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    workers = [int(line) for line in pids.read_text().split()]
    assert all(map(alive, workers))
    with pytest.raises(DeliberateError, match="in use"):
        check_unlocked(tmp_path)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    check_unlocked(tmp_path)


@pytest.fixture
def file_limit():
    """Files may grow to so many bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "exits.safetensors", "optimizer.pt", "metrics.csv"]
)
def test_a_full_disk_is_one_line_that_names_what_is_intact(stock, done, tmp_path, name, file_limit):
    """Each kind of file that a checkpoint has, and the log."""
    folder = tmp_path / "run"
    sizes = {
        path.name: path.stat().st_size
        for path in [*(done / "checkpoint-4").iterdir(), done / "metrics.csv"]
    }
    original = app.AdaptiveTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 1:
            file_limit(150 if name == "metrics.csv" else sizes[name] - 1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.AdaptiveTrainer, "compute_loss", compute_loss)
        with pytest.raises(
            DeliberateError, match=r"^cannot write .*checkpoint-1 is intact"
        ) as error:
            train(compose("train", settings(stock, folder)))
    assert "resume=true" in one_line(error)
    assert [p.name for p in all_checkpoints(folder)] == ["checkpoint-1"]
    assert not (folder / "saving").exists()


def test_a_full_device_and_a_foreign_failure_are_told_apart(tmp_path):
    with (
        pytest.raises(DeliberateError, match="No space left on device") as error,
        writing(tmp_path, "the log"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    one_line(error)
    with pytest.raises(FileNotFoundError), writing(tmp_path, "the log"):
        os.stat("/no/such/data")
    with pytest.raises(RuntimeError, match="sizes"), writing(tmp_path, "the log"):
        raise RuntimeError("sizes differ")


@pytest.mark.parametrize("where", ["/proc/deliberate/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_one_line(stock, where):
    with pytest.raises(DeliberateError, match=r"^cannot write the run in") as error:
        main(settings(stock, where))
    assert where in one_line(error)


class Served(torch.utils.data.Dataset):
    """Micro-batches of a smaller data set than the run needs; remembers which were taken."""

    def __init__(self, batches, size):
        self.batches, self.size, self.taken = batches, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.taken.append(index)
        return self.batches[index]


@pytest.mark.parametrize("stop", [8, 7, 5])
def test_a_run_resumes_in_the_middle_of_a_later_epoch(stock, tmp_path, stop):
    """At 1.6 epochs with 4 micro-batches a step, where `skip_first_batches` has to count right.

    accelerate #4071: it resets the epoch of the sampler. Ours has none to reset.
    """
    own = ["trainer.micro_batches=4", "trainer.max_steps=10", f"trainer.save_every={stop}"]
    cfg = compose("train", settings(stock, tmp_path, *own))

    def run(folder, checkpoint=None):
        torch.manual_seed(0)
        problems = setup.training_problems(cfg)
        model, tokenizer = setup.build_model(cfg, problems)
        served = Served(setup.build_batches(cfg, tokenizer, problems), 5 * 4)
        trainer = app.AdaptiveTrainer(
            setup.build_objective(cfg, model),
            app.training_arguments(folder, cfg.trainer, seed=0, report_to=[], run_name="run"),
            served,
            optimizer="adamw",
            processing_class=tokenizer,
        )
        trainer.train_from(checkpoint)
        return served.taken, model.state_dict()

    taken, expected = run(tmp_path / "straight")
    assert taken == [*range(20), *range(20)]
    resumed, got = run(tmp_path / "resumed", tmp_path / "straight" / f"checkpoint-{stop}")
    assert resumed == taken[4 * stop :]
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_a_run_resumed_with_another_learning_rate_and_decay_has_them(stock, tmp_path):
    whole = ["recipe=layerskip", "trainer.optimizer=adamw"]
    train(compose("train", settings(stock, tmp_path / "0", *whole, "trainer.max_steps=2")))
    ends = []
    for factor, decay in ((1, 0.25), (2, 0.5)):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(factor))
        train(compose("train", settings(
            stock, folder, *whole, "resume=changed", "trainer.max_steps=4",
            f"trainer.learning_rate={1e-4 * factor}", f"trainer.weight_decay={decay}",
        )))  # fmt: skip
        lines = [one for one in read_json(folder / "run.json")["history"] if "loss" in one]
        state = torch.load(newest_intact(folder) / "optimizer.pt", weights_only=False)
        assert {group["weight_decay"] for group in state["param_groups"]} == {decay, 0.0}
        ends.append([one["learning_rate"] for one in lines[2:]])
    once, twice = ends
    assert min(once) > 0 and twice == pytest.approx([2 * one for one in once])
