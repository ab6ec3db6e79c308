"""A draft layer trained in batches on the model's device, for so many seconds."""

from __future__ import annotations

import gzip
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.draft_files import load_draft
from deliberate.api.model import AdaptiveModel
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.train.draft import batched, timed
from deliberate.train.draft.batched import DeviceTexts, batch_loss, train_for
from deliberate.train.draft.draft_trainer import DraftTrainer, DraftTraining
from deliberate.train.draft.start import draft_config, start_from_model
from deliberate.utils.json_files import read_json

HOW = DraftTraining(depth=3, texts_per_step=2, learning_rate=3e-3)


@pytest.fixture
def parts():
    """A tiny model, three texts of different lengths on its device, and a draft layer."""
    base = tiny_model("llama").float()
    base.requires_grad_(False)
    model = AdaptiveModel(base, [1], executor="generic")
    ids = random_ids(24, batch=3).tolist()
    rows = [(ids[0], 5), (ids[1][:13], 2), (ids[2][:9], 4)]
    data = DeviceTexts(base, model.backbone, rows)
    torch.manual_seed(0)
    layer = DraftLayer(draft_config(model.backbone, model.backbone.vocab_size))
    start_from_model(layer, model.backbone)
    return data, layer, model.backbone.lm_head.weight.detach(), rows, base


def test_states_of_a_padded_pass_are_those_of_each_text_alone(parts):
    data, _, _, rows, base = parts
    for text, (ids, _) in zip(data.texts, rows, strict=True):
        alone = base.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        held = data.read(text)
        assert torch.allclose(held.normed, alone, atol=2e-2, rtol=1e-2)
        assert len(held.embedded) == len(ids) - 1


def test_the_loss_of_one_text_is_the_trainers_and_padding_changes_nothing(parts):
    data, layer, head, _, _ = parts
    trainer = DraftTrainer(layer, head, data, data.texts, HOW, dtype=torch.float32)
    layer.requires_grad_(False)
    alone = []
    for text in data.texts:
        loss = batch_loss(layer, head, data.norm, *data.batch([text]), [text], HOW)
        assert float(loss) == pytest.approx(float(trainer.loss(data.read(text))), rel=1e-4)
        embedded, normed = data.batch([data.texts[0], text])  # padded to the longest
        one = [normed[1:], [text]]
        padded = batch_loss(layer, head, data.norm, embedded[1:], *one, HOW)
        assert float(padded) == pytest.approx(float(loss), rel=1e-4)
        alone.append(float(loss))
    both = batch_loss(layer, head, data.norm, *data.batch(data.texts), data.texts, HOW)
    assert min(alone) < float(both) < max(alone)


def test_training_lowers_the_loss_and_ends_by_the_clock(parts, monkeypatch):
    data, layer, head, _, _ = parts
    # A step takes a twentieth of a second, however busy the machine is.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.05 * next(ticks))
    monkeypatch.setattr(batched, "time", clock)

    def loss() -> float:
        return float(batch_loss(layer, head, data.norm, *data.batch(data.texts), data.texts, HOW))

    before, notes = loss(), []
    layer.requires_grad_(True)
    noted = lambda *given: notes.append(given)  # noqa: E731
    steps = train_for(1.5, layer, head, data, data.texts, HOW, note=noted)
    assert steps == 29
    assert loss() < 0.9 * before
    assert (
        notes
        and notes[-1][0] <= steps
        and notes[-1][2] == pytest.approx(2 / 3 * notes[-1][0] * 0.75, rel=0.1)
    )


def test_the_command_leaves_a_layer_that_loads_its_figures_and_the_text(tmp_path):
    questions = tmp_path / "questions.json.gz"
    questions.write_bytes(gzip.compress(json.dumps([f"{n} + {n}?" for n in range(6)]).encode()))
    out = tmp_path / "made"
    given = ["--model", "tiny", "--questions", str(questions), "--out", str(out)]
    given += ["--held-out", "2", "--text-seconds", "0.5", "--train-seconds", "0.5", "--batch", "3"]
    given += ["--new-tokens", "12", "--vocabulary", "64", "--kept", "32", "--texts-per-step", "2"]
    assert timed.main(given) == 0
    layer, prior = load_draft(out, read_json(out / "adaptive_config.json")["draft"])
    figures = read_json(out / "training.json")
    assert layer.config.vocabulary == 32
    assert list(prior.survives) == figures["after"]["survives"]
    lines = gzip.decompress((out / "own-text.jsonl.gz").read_bytes()).splitlines()
    assert len(lines) == figures["texts"] and figures["held_out"]["texts"] <= 2
