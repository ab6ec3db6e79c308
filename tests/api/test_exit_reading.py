"""Exits' heads are built when exits are read, not before."""

from __future__ import annotations

import torch
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.api.model_executors import ModelExecutors
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig
from deliberate.modeling.exit_config import ExitConfig


def test_an_answer_that_reads_no_exit_builds_no_head_of_one(monkeypatch) -> None:
    config = ExitConfig.build(6, [1, 3], 0.05)
    model = AdaptiveModel(tiny_model("llama", layers=6, dtype=torch.float32), config)
    with torch.no_grad():  # exits that were never trained are not read in exact mode
        for parameter in model.exits.parameters():
            parameter.add_(0.01)
    built = []
    new_reader = ModelExecutors._new_reader
    monkeypatch.setattr(
        ModelExecutors, "_new_reader", lambda *args: built.append(1) or new_reader(*args)
    )

    def answer(fidelity: str) -> list:
        return model.generate(random_ids(6), max_new_tokens=6, fidelity=fidelity).tolist()

    dense = answer("dense")
    assert not built
    assert answer("exact") == dense and len(built) == 1
    width = model.backbone.hidden_size
    model.attach_draft(DraftLayer(DraftLayerConfig(width, 4, 2, 8, 48, VOCAB)), DraftPrior())
    built.clear()
    model._executors.forget()  # as in a fresh process
    assert answer("exact") == dense and not built
    answer("threshold")
    assert built == [1]
