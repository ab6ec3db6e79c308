"""Several steps of the C++ kernels in one call do what single steps do."""

from __future__ import annotations

import math

import pytest
import torch
from fused_cases import FAMILIES
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.executors.fused.backbone import FusedBackbone
from deliberate.kernels import native_build

pytestmark = pytest.mark.skipif(
    native_build.unavailable() is not None, reason=str(native_build.unavailable())
)


def single(name: str, **overrides):
    architecture, settings = FAMILIES[name]
    return tiny_model(architecture, dtype=torch.float32, **(settings | overrides))


def account(adaptive: AdaptiveModel, prompt: torch.Tensor, **settings):
    out = adaptive.generate(
        prompt, max_new_tokens=24, return_dict_in_generate=True, online=False, **settings
    )
    trace = out.trace
    return {
        "tokens": out.sequences[0].tolist(),
        "exits": [record.exit_layer for record in trace.records],
        "verified": [record.verified for record in trace.records],
        "calls": list(trace.layer_calls),
        "positions": list(trace.layer_positions),
        "drafted": (trace.drafted, trace.rejected, trace.discarded),
        "finish": trace.finish,
    }


@pytest.mark.parametrize("fidelity", ["dense", "exact", "threshold"])
@pytest.mark.parametrize(
    "thresholds", [(0.0, 0.0, 0.0), (0.12, 0.12, 0.12), (math.inf, 0.12, math.inf)]
)
@pytest.mark.parametrize("end", [None, 41])
def test_steps_ahead_do_what_single_steps_do(monkeypatch, fidelity, thresholds, end):
    base = single("llama", layers=5)
    base.generation_config.eos_token_id = end
    adaptive = AdaptiveModel(base, [1, 2, 3], executor="fused", engine="native")
    settings = {"fidelity": fidelity}
    if fidelity != "dense":
        settings["exit_policy"] = FixedPolicy(thresholds)
    for seed in range(3):
        prompt = random_ids(7, seed=seed)
        multi_step = account(adaptive, prompt, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(FusedBackbone, "multi_step", lambda *_: None)
            assert account(adaptive, prompt, **settings) == multi_step


def test_drafting_needs_one_call_for_a_run_of_tokens(monkeypatch):
    adaptive = AdaptiveModel(single("llama"), [1], executor="fused", engine="native")
    calls = []
    run = FusedBackbone.run_layers
    monkeypatch.setattr(
        FusedBackbone,
        "run_layers",
        lambda self, hidden, first, last, *rest: (
            calls.append((first, last, hidden.shape[1])) or run(self, hidden, first, last, *rest)
        ),
    )
    adaptive.generate(
        random_ids(7), max_new_tokens=40, fidelity="threshold", thresholds=1e-6, online=False
    )
    assert {(first, last) for first, last, _ in calls[1:]} == {(1, 4)}
