"""Loss on texts that are not trained on is logged beside the teacher's, as training goes on."""

from __future__ import annotations

import json

import pytest
import torch
from random_checkpoint import save_checkpoint
from recipe_cases import SMALL, run
from torch.nn import functional

from deliberate.api import checkpoint
from deliberate.train.checks import check_config
from deliberate.train.held_out import CSV_NAME, read_csv, summary
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

TEXTS = [
    {"tokens": [5, 6, 7, 8, 9, 10], "prompt": 2},
    {"tokens": [11, 12, 13, 14], "prompt": 0},
]


@pytest.fixture
def start(tmp_path):
    return save_checkpoint(tmp_path / "start")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in TEXTS))
    return path


def sums(model, cases=((TEXTS[0], 2), (TEXTS[1], 1))):
    """Nats of every answer's tokens, a text, by transformers alone."""
    found = []
    for text, begin in cases:
        ids = torch.tensor([text["tokens"]])
        with torch.no_grad():
            logits = model.eval()(ids).logits[0, begin - 1 : -1]
        found.append(float(functional.cross_entropy(logits, ids[0, begin:], reduction="sum")))
    return found


def settings(start, file, *more):
    return ["recipe=distill", "model=folder", "model.keep_layers=[1,2,4]",
            f"recipe.teacher='{start}'", f"trainer.held_out='{file}'", *more]  # fmt: skip


def test_losses_before_training_at_the_steps_asked_and_at_the_end(start, file, tmp_path, capsys):
    folder = tmp_path / "out"
    record = run(start, folder, *settings(start, file, "trainer.held_out_every=3"))
    assert [one["step"] for one in record["held_out"]] == [0, 3, 4]
    assert [one.step for one in read_csv(folder / CSV_NAME)] == [0, 3, 4]
    assert capsys.readouterr().out.count("held out: step ") == 3
    for name, own in (("teacher", checkpoint.load_base(start)),
                      ("loss", checkpoint.load_base(folder / "model"))):  # fmt: skip
        assert record["held_out"][-1][name] == pytest.approx(sum(sums(own)) / 7, rel=1e-4)
    assert record["held_out"][0]["loss"] != record["held_out"][-1]["loss"]


def test_reading_does_not_change_what_is_trained(start, file, tmp_path):
    given = settings(start, file, "trainer.held_out_every=1")
    plain = [one for one in given if "held_out" not in one]
    runs = [run(start, tmp_path / name, *own) for name, own in (("a", given), ("b", plain))]
    one, other = ([line["loss"] for line in own["history"] if "loss" in line] for own in runs)
    assert one == other and runs[1]["held_out"] == []


def test_a_resumed_run_keeps_what_was_measured_before(start, file, tmp_path):
    folder = tmp_path / "out"
    given = settings(start, file, "trainer.held_out_every=1")
    first = run(start, folder, *given, "trainer.max_steps=2")
    again = run(start, folder, *given, "trainer.max_steps=4", "resume=changed")
    assert [one["step"] for one in again["held_out"]] == [0, 1, 2, 3, 4]
    assert again["held_out"][:3] == first["held_out"]


def test_the_ratio_is_of_all_tokens_and_its_interval_of_texts():
    found = summary(7, [10, 30], [4.0, 6.0], [4.0, 4.0])
    assert (found.loss, found.teacher, found.ratio) == (0.25, 0.2, 1.25)
    assert (found.low, found.high) == (1.0, 1.5)
    assert "ratio 1.250 [1.000, 1.500]" in found.line()
    alone = summary(7, [10], [4.0], None)
    assert "teacher" not in alone.line() and alone.loss == 0.4 and alone.teacher is None


def test_without_a_teacher_the_loss_alone_is_logged(start, file, tmp_path):
    folder = tmp_path / "out"
    given = settings(start, file, "trainer.held_out_every=1", "recipe.teacher=null")
    first = run(start, folder, *given, "trainer.max_steps=2")["held_out"]
    again = run(start, folder, *given, "trainer.max_steps=3", "resume=changed")["held_out"]
    assert [one["step"] for one in again] == [0, 1, 2, 3] and again[:3] == first
    assert all(one["loss"] > 0 and one["teacher"] is None for one in again)


@pytest.mark.parametrize(
    ("rows", "more", "named"),
    [
        (None, [], "trainer.held_out=.*does not exist"),
        ([{"tokens": [5] * 151, "prompt": 150}], [], "has no text with an answer"),
        ([{"tokens": [5, 6], "prompt": 2}], [], "prompt=2 must be how many of its 2 tokens"),
        (TEXTS, ["trainer.held_out_every=0"], "trainer.held_out_every=0 must be a whole"),
        (
            TEXTS,
            ["trainer.fsdp=true", "trainer.processes=2", "trainer.optimizer=adamw"],
            "no process has the whole model",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(rows, more, named, start, tmp_path):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    cfg = compose("train", [*settings(start, path, *SMALL, *more), f"model.path='{start}'",
                            f"output_dir='{tmp_path / 'out'}'"])  # fmt: skip
    with pytest.raises(DeliberateError, match=named) as caught:
        check_config(cfg)
    assert "\n" not in str(caught.value)
