"""Several processes, sharding, and killed runs: the same losses as one uninterrupted process."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from random_checkpoint import save_checkpoint

from deliberate.api.model import AdaptiveModel
from deliberate.train import app
from deliberate.train.app import main, train
from deliberate.train.checkpoints import newest_intact
from deliberate.train.distributed.workers import LAUNCHER_VARIABLE
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

STEPS = 20
SETTINGS = [
    "recipe=layerskip", "model=folder", "data=words", "data.max_tokens=150", "trainer=finetune",
    f"trainer.max_steps={STEPS}", "trainer.tokens_per_step=900", "trainer.micro_batches=4",
    "trainer.warmup_steps=2", "trainer.log_every=1", "trainer.save_every=10",
    "trainer.bf16=false", "trainer.target_agreement=null", "trainer.learning_rate=0.002",
    # Random draws that would differ if they hung on the process or on what was drawn before.
    "recipe.layer_dropout=0.5",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "random")


def settings(stock, folder, *overrides):
    return [*SETTINGS, f"model.path='{stock}'", f"output_dir='{folder}'", *overrides]


def losses(folder):
    """Loss and figures by exit of every step that was logged."""
    history = json.loads((folder / "run.json").read_text())["history"]
    return {
        line["step"]: {n: v for n, v in line.items() if n == "loss" or "/" in n or "speed" in n}
        for line in history
        if "loss" in line
    }


def assert_close(got, expected):
    assert sorted(got) == sorted(expected)
    for step, line in expected.items():
        assert got[step]["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert got[step]["loss/exit4"] == pytest.approx(line["loss/exit4"], abs=1e-4)


@pytest.fixture(scope="module")
def alone(stock, tmp_path_factory):
    """One process, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    train(compose("train", settings(stock, folder)))
    return folder


@pytest.fixture(scope="module")
def pair(stock, tmp_path_factory):
    """Two processes started by the command itself."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    main(settings(stock, folder, "trainer.processes=2"))
    return folder


def test_two_processes_have_the_losses_of_one_over_20_steps(alone, pair):
    assert (pair / "checkpoint-10" / "rng_state_1.pth").is_file()
    assert len(losses(pair)) == STEPS
    assert_close(losses(pair), losses(alone))
    two, one = (json.loads((folder / "run.json").read_text()) for folder in (pair, alone))
    assert two["command"].endswith("trainer.processes=2")
    for line, other in zip(two["history"], one["history"], strict=True):
        assert line.get("target_tokens") == other.get("target_tokens")
        if "grad_norm" in line:
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)
    assert_same_weights(pair, alone)


def assert_same_weights(folder, alone):
    expected = AdaptiveModel.from_pretrained(alone / "model").state_dict()
    for name, value in AdaptiveModel.from_pretrained(folder / "model").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_a_run_of_two_processes_resumes_as_one(stock, alone, pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    record = train(compose("train", settings(stock, folder, "resume=true")))
    assert record["resumed_from"] == "checkpoint-10"
    assert_close(losses(folder), losses(alone))


def test_a_sharded_run_has_the_losses_of_one_process(stock, alone, tmp_path):
    """Started by torchrun, which says how many processes there are."""
    folder = tmp_path / "sharded"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "deliberate.train.app",
         *settings(stock, folder, "trainer.fsdp=true")],
        check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "sharded over 2 processes" in done.stdout
    assert_close(losses(folder), losses(alone))
    for name in (folder / "model", folder / "checkpoint-10"):
        weights = AdaptiveModel.from_pretrained(name).state_dict()
        assert all(value.isfinite().all() for value in weights.values())
    assert_same_weights(folder, alone)
    with pytest.raises(DeliberateError, match=r"written with sharding"):
        train(compose("train", settings(stock, folder, "resume=changed", "trainer.max_steps=30")))


@pytest.mark.parametrize(
    ("here", "rank", "fsdp", "alone"),
    [(True, "0", "false", True), (True, "1", "false", False), (True, "0", "true", False),
     (False, "0", "false", False)],
)  # fmt: skip
def test_only_the_first_worker_of_a_run_that_is_not_sharded_saves_alone(
    here, rank, fsdp, alone, tmp_path, stock, monkeypatch
):
    given = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": "2"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    if here:
        monkeypatch.setenv(LAUNCHER_VARIABLE, "0")
    cfg = compose("train", settings(stock, tmp_path, f"trainer.fsdp={fsdp}"))
    assert app._saves_alone(cfg) is alone


def rows(folder):
    path = folder / "metrics.csv"
    return path.read_text().splitlines() if path.is_file() else []


def test_a_run_killed_at_any_moment_ends_with_the_same_loss_curve(stock, alone, tmp_path):
    """Bit for bit, whatever it was doing: the moment is drawn anew each time."""
    moment = random.SystemRandom()
    after = moment.randrange(1, STEPS - 7)
    for number in range(5):  # on a busy machine a run may end before this process has its turn
        folder = tmp_path / f"killed-{number}"
        arguments = settings(stock, folder, "trainer.save_every=3")
        command = [sys.executable, "-m", "deliberate.train.app", *arguments]
        child = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
        )
        while len(rows(folder)) <= after and child.poll() is None:
            time.sleep(0.002)
        time.sleep(moment.random() * 0.05)
        child.kill()
        child.wait()
        if not (folder / "run.json").exists():
            break
    else:
        pytest.fail("every run had ended before it was killed")
    found = newest_intact(folder)
    record = train(compose("train", [*arguments, "resume=true"]))
    assert record["resumed_from"] == (None if found is None else found.name)
    assert losses(folder) == losses(alone), f"killed after {after} steps"
    assert len(rows(folder)) == STEPS + 1
    assert rows(folder) == rows(alone)
    expected = AdaptiveModel.from_pretrained(alone / "model").state_dict()
    for name, value in AdaptiveModel.from_pretrained(folder / "model").state_dict().items():
        assert torch.equal(value, expected[name])


def test_processes_that_differ_from_those_launched_are_one_line(stock, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(DeliberateError, match=r"trainer\.processes=2 but 4 were launched"):
        train(compose("train", settings(stock, tmp_path / "run", "trainer.processes=2")))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DeliberateError, match=r"multiple of trainer\.processes=3"):
        train(compose("train", settings(stock, tmp_path / "run")))
    assert not Path(tmp_path / "run").exists()
