"""`deliberate train` from end to end on toy models: files, resuming, Ctrl-C, workers, sweeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_calibration import tiny_calibration

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibration import CALIBRATION_NAME
from deliberate.train import app, setup
from deliberate.train import trainer as trainer_module
from deliberate.train.app import main, train
from deliberate.train.checkpoints import newest_intact
from deliberate.train.distributed import workers
from deliberate.train.distributed.workers import run_workers
from deliberate.train.interrupt import StepAbandoned, StopOnInterrupt, handle_signals_in_backward
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

TOY = [
    "debug=fast",
    "data=words",
    "model.vocab_size=300",
    "trainer.max_steps=4",
    "trainer.save_every=100",
    "trainer.bf16=false",
    # So high that a resumed run which draws other random numbers cannot end at the same weights.
    "recipe.layer_dropout=0.5",
]


@pytest.fixture(scope="module", autouse=True)
def small_corpus():
    """Tokenizers trained on fewer texts: most of the time of a toy run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "TOKENIZER_WORDS", 300)
        yield


def toy(output, *overrides):
    return compose("train", [*TOY, f"output_dir='{output}'", *overrides])


def weights(folder):
    return AdaptiveModel.from_pretrained(folder).state_dict()


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def losses(record):
    """Everything logged that does not depend on the clock."""
    return [
        {name: value for name, value in line.items() if "runtime" not in name}
        for line in record["history"]
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 4 steps without interruption, by the command line's entry."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    main([*TOY, f"output_dir='{folder}'"])
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The same run, with Ctrl-C while the second step is computed."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    original = trainer_module.AdaptiveTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.AdaptiveTrainer, "compute_loss", compute_loss)
        record = train(toy(folder, "trainer.micro_batches=1"))
    return folder, record


def test_a_run_writes_a_model_its_configuration_and_its_record(straight):
    assert (straight / "model" / "config.json").is_file()
    assert (straight / "config.yaml").is_file()
    record = record_of(straight)
    assert record["command"].startswith("deliberate train debug=fast data=words")
    assert (record["steps"], record["interrupted"], record["recipe"]) == (4, False, "pretrain")
    assert record["config"]["model"]["vocab_size"] == 300
    assert [line["step"] for line in losses(record)] == [1, 2, 3, 4]
    for name in ("loss/exit1", "agree/exit2", "hit/exit4", "target_tokens"):
        assert all(name in line for line in losses(record))


def test_the_model_of_a_run_answers(straight):
    model = AdaptiveModel.from_pretrained(straight / "model")
    tokenizer = load_tokenizer(straight / "model")
    assert model.exit_config.layers == (1, 2)
    ids = torch.tensor([tokenizer.encode("Question: How many?\nAnswer:")])
    assert torch.isfinite(model(ids).logits).all()


def test_ctrl_c_drops_the_unfinished_step_and_saves_a_usable_checkpoint(interrupted):
    folder, record = interrupted
    assert record["interrupted"] and record["steps"] == 1
    assert newest_intact(folder).name == "checkpoint-1"
    saved, final = weights(folder / "checkpoint-1"), weights(folder / "model")
    assert all(torch.equal(saved[name], final[name]) for name in final)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_resumed_run_ends_with_the_same_bits(interrupted, tmp_path, capsys):
    folder = tmp_path / "resumed"
    shutil.copytree(interrupted[0], folder)
    cut = "trainer.micro_batches=1"
    straight = train(toy(tmp_path, cut))
    resumed = train(toy(folder, cut, "resume=true"))
    assert resumed["resumed_from"] == "checkpoint-1" and resumed["steps"] == 4
    assert losses(resumed) == losses(straight)
    one, other = weights(tmp_path / "model"), weights(folder / "model")
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert "not the same run" not in capsys.readouterr().out


def test_a_run_of_other_settings_is_refused_without_resume_changed(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    with pytest.raises(DeliberateError, match="another configuration") as error:
        main([*TOY, f"output_dir='{folder}'", "resume=true", "trainer.learning_rate=0.1", "seed=1"])
    assert "seed was 0 and is 1 (and 1 more)" in str(error.value)
    assert "\n" not in str(error.value)
    train(toy(folder, "resume=true", "trainer.processes=1", "trainer.log_every=2"))
    assert "not the same run" not in capsys.readouterr().out
    train(toy(folder, "resume=changed", "trainer.learning_rate=0.1"))
    assert "trainer.learning_rate was 0.004 and is 0.1" in capsys.readouterr().out
    with pytest.raises(DeliberateError, match="another model") as error:
        train(toy(folder, "resume=changed", "model.intermediate_size=32"))
    assert "\n" not in str(error.value)


def test_heads_are_trained_on_a_finished_run_without_touching_its_backbone(straight, tmp_path):
    calibrated = tmp_path / "calibrated"
    shutil.copytree(straight / "model", calibrated)
    tiny_calibration(AdaptiveModel.from_pretrained(calibrated)).save(calibrated / CALIBRATION_NAME)
    before = weights(calibrated)
    cfg = compose("train", [
        *TOY[:2], "trainer.max_steps=2", "recipe=heads", "model=folder",
        f"model.path='{calibrated}'", f"output_dir='{tmp_path / 'heads'}'",
    ])  # fmt: skip
    record = train(cfg)
    # What was fitted to other exits is left behind.
    assert AdaptiveModel.from_pretrained(calibrated).calibration is not None
    assert AdaptiveModel.from_pretrained(tmp_path / "heads" / "model").calibration is None
    after = weights(tmp_path / "heads" / "model")
    assert record["parameters"]["trainable"] < record["parameters"]["total"]
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("exits.") for name in moved)
    assert (tmp_path / "heads" / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "mistake",
    [
        "trainer.max_step=3",
        "recipe=dropout",
        "exits.layers=[2,99]",
        "+data.weights={gym/gsm_symbolic: 1}",
        "+data.weights={gsm8k: 1}",
    ],
)
def test_a_mistake_is_one_line_before_any_folder_exists(mistake, tmp_path):
    with pytest.raises(DeliberateError) as error:
        main([*TOY, f"output_dir='{tmp_path / 'run'}'", "data.dir=/no/such/folder", mistake])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_checkpoints_is_refused_unless_resumed(straight):
    before = record_of(straight)
    with pytest.raises(DeliberateError, match="resume=true"):
        main([*TOY, f"output_dir='{straight}'"])
    assert record_of(straight) == before


def test_a_sweep_gives_every_job_a_folder_of_its_own(tmp_path):
    short = [*TOY, "trainer.max_steps=1", f"output_dir='{tmp_path}'"]
    main(["--multirun", *short, "seed=0,1"])
    for job in ("0", "1"):
        record = record_of(tmp_path / job)
        assert record["seed"] == int(job)
        assert record["config"]["output_dir"] == str(tmp_path / job)
    assert losses(record_of(tmp_path / "0")) != losses(record_of(tmp_path / "1"))
    assert not (tmp_path / "run.json").exists()


def test_a_mistake_in_a_sweep_is_one_line(tmp_path):
    with pytest.raises(DeliberateError, match=r"trainer\.max_steps") as error:
        main(["-m", *TOY, f"output_dir='{tmp_path}'", "trainer.max_step=1,2"])
    assert "\n" not in str(error.value)


def test_hydra_shows_the_configuration_without_running(tmp_path, capsys):
    main(["--cfg", "job", *TOY, f"output_dir='{tmp_path / 'run'}'"])
    assert "vocab_size: 300" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def pretend_python(folder, monkeypatch, script):
    """Workers that run a shell script instead of the command."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_failing_worker_is_one_line_and_ends_the_others(tmp_path, monkeypatch):
    up, ended = tmp_path / "up", tmp_path / "ended"
    script = f"""if [ "$RANK" = 1 ]; then until [ -e "{up}" ]; do sleep 0.1; done; exit 3; fi
trap 'touch "{ended}"; exit 0' TERM
touch "{up}"
for i in $(seq 1200); do sleep 0.1; done"""
    pretend_python(tmp_path, monkeypatch, script)
    with pytest.raises(DeliberateError, match=r"^training worker 1 ended with status 3: .*$"):
        run_workers(2, [])
    assert ended.exists()  # not by itself


def test_ctrl_c_reaches_every_worker_once(tmp_path, monkeypatch):
    log = tmp_path / "log"
    script = f"""trap 'echo $RANK of $WORLD_SIZE >> "{log}"' INT
echo up >> "{log}"
while [ "$(grep -c of "{log}")" != 2 ]; do sleep 0.1; done"""
    pretend_python(tmp_path, monkeypatch, script)

    def interrupt():
        while not log.exists() or log.read_text().count("up") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run_workers(2, [])
    assert sorted(log.read_text().split("\n"))[1:3] == ["0 of 2", "1 of 2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_a_worker_is_started_reaches_it_too(tmp_path, monkeypatch):
    """It runs before the call that starts it returns: without this the run never ended."""
    log = tmp_path / "log"
    script = f"""trap 'echo $RANK of $WORLD_SIZE >> "{log}"; exit 0' INT
echo up >> "{log}"
for i in $(seq 600); do sleep 0.1; done"""
    pretend_python(tmp_path, monkeypatch, script)
    start = workers.subprocess.Popen

    def starts(*args, **kwargs):
        worker, count = start(*args, **kwargs), int(kwargs["env"]["RANK"]) + 1
        while not log.exists() or log.read_text().count("up") < count:
            time.sleep(0.05)
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return worker

    monkeypatch.setattr(
        workers, "subprocess", SimpleNamespace(**(vars(subprocess) | {"Popen": starts}))
    )
    assert run_workers(2, [])
    assert sorted(log.read_text().split("\n"))[1:3] == ["0 of 2", "1 of 2"]


def test_wandb_logs_offline_and_a_resumed_run_gets_another_id(tmp_path, monkeypatch):
    """wandb #2423: synchronising a second offline folder of one id erases the first."""
    wandb = pytest.importorskip("wandb")
    for name in ("MODE", "PROJECT", "DIR", "RUN_ID", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    seen, finish = [], wandb.finish
    monkeypatch.setattr(
        wandb, "finish", lambda: (seen.append((wandb.run.id, wandb.run.group)), finish())
    )
    train(toy(tmp_path, "trainer.max_steps=1", "logger=wandb"))
    (first,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    before = first.read_bytes()
    assert wandb.run is None
    assert "WANDB_DIR" not in os.environ and "WANDB_RUN_ID" not in os.environ
    train(toy(tmp_path, "trainer.max_steps=2", "logger=wandb", "resume=changed"))
    (one, group), (other, same) = seen
    assert one != other and group == same and one.startswith(group) and other.startswith(group)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert first.read_bytes() == before
    monkeypatch.setenv("WANDB_RUN_ID", one)
    with pytest.raises(DeliberateError, match=f"WANDB_RUN_ID={one} is the id of an earlier part"):
        train(toy(tmp_path, "trainer.max_steps=3", "logger=wandb", "resume=changed"))


def test_ctrl_c_is_handled_inside_a_backward_pass():
    """`backward` is one call into C++, during which Python runs no signal handler."""
    weights = [torch.full((400, 400), 1e-3, requires_grad=True) for _ in range(150)]
    x = torch.ones(400, 400)
    for weight in weights:
        x = x @ weight
    loss = x.sum()
    handle_signals_in_backward(loss)
    with StopOnInterrupt(may_abandon=True, prints=False) as interrupt:
        interrupt.on_step_begin(None, None, None)
        begun = threading.Event()
        # Of the pass itself: a clock would send it before the pass begins on a busy machine.
        weights[-1].register_hook(lambda _gradient: begun.set())
        press = lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGINT))  # noqa: E731
        pressing = threading.Thread(target=press)
        pressing.start()
        with pytest.raises(StepAbandoned):
            loss.backward()
        pressing.join()
    assert interrupt.interrupted and weights[0].grad is None


def test_ctrl_c_while_weights_change_waits_for_the_end_of_the_step():
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    with StopOnInterrupt(may_abandon=True, prints=False) as interrupt:
        interrupt.on_step_begin(None, None, None)
        interrupt.on_pre_optimizer_step(None, None, None)
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.interrupted
        interrupt.on_step_end(SimpleNamespace(world_size=1), None, control)
    assert interrupt.interrupted and control.should_save and control.should_training_stop


def test_ctrl_c_before_the_first_step_is_done_saves_nothing(tmp_path, monkeypatch, capsys):
    original = trainer_module.AdaptiveTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdaptiveTrainer, "compute_loss", compute_loss)
    assert train(toy(tmp_path)) == {"interrupted": True}
    assert "nothing is saved" in capsys.readouterr().out
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model").exists()


@pytest.mark.parametrize("how", [[], ["debug=dry_run"]])
def test_weights_given_whole_replace_those_of_the_group(tmp_path, monkeypatch, how):
    seen = []
    monkeypatch.setattr(app, "train", lambda cfg: seen.append(dict(cfg.data.weights)) or {})
    own = [*TOY[2:], "data=gsm8k_math", "data.packing=false", f"output_dir='{tmp_path}'", *how]
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text('{"question": "How many?", "answer": "4\\n#### 4"}\n')
    own.append(f"data.dir='{tmp_path / 'data'}'")
    main([*own, "data.weights={gsm8k:1}"])
    main([*own, "+data.weights={mine:0}", "data.weights.math=0"])
    assert seen == [{"gsm8k": 1}, {"gsm8k": 0.45, "math": 0, "words": 0.2, "mine": 0}]
    with pytest.raises(DeliberateError, match=r"a sweep cannot replace data\.weights"):
        main(["-m", *own, "data.weights={gsm8k:1},{math:1}"])
