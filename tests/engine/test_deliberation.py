"""Deliberation rounds while decoding: for which tokens they run."""

from __future__ import annotations

import math

import torch
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.deliberation import GateRunner
from deliberate.modeling.deliberation_gate import GateConfig


@torch.inference_mode()
def test_rounds_run_only_below_the_gate_threshold():
    model = AdaptiveModel(tiny_model("llama"), [1, 2])
    gate = model.attach_gate(GateConfig(rounds=1, width=24, heads=2))
    backbone, counts = model.backbone, []
    ctx = backbone.context(0, 5, device="cpu")
    hidden = backbone.embed(random_ids(5), ctx)
    hidden = backbone.run_layers(hidden, 0, backbone.num_layers, ctx, backbone.new_cache())
    runner = GateRunner(gate, backbone, counts)
    runner.open(1)
    runner.remember(hidden, ctx)
    logits = backbone.logits(hidden[0, 4:])
    (probability,) = runner.probabilities(logits)
    for threshold, rounds in ((probability, 0), (math.nextafter(probability, 1.0), 1)):
        assert runner.deliberate(hidden[0, 4:], logits, [0], [4], [threshold])[1] == [rounds]
    assert counts == [1]
