"""Measured times decide how exact mode decodes, never what: tokens are dense's by any clock."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.loop_settings import Stopwatch
from deliberate.engine.request import Request
from deliberate.engine.spec import DecodingSpec
from deliberate.kernels.native_drafted import DraftedCall
from deliberate.kernels.native_drafts import PackedRows
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig


class OddClock:
    """Stands still or goes on by up to a second: for a while by much, for a while by little."""

    def __init__(self, seed: int) -> None:
        self.dice, self.now, self.reads, self.scale = random.Random(seed), 0.0, 0, 1.0

    def __call__(self) -> float:
        if self.reads % 60 == 0:
            self.scale = 10 ** self.dice.uniform(-6, 0)
        self.reads += 1
        self.now += self.step(self.scale)
        return self.now

    def step(self, seconds: float) -> float:
        """Anything from nothing to twenty times as long."""
        return self.dice.choice([0.0, 0.2, 1.0, 20.0]) * seconds


@pytest.fixture(params=range(3))
def clock(request, monkeypatch) -> OddClock:
    """The clock of all that decodes, and of the C++ kernels where their times are read."""
    odd = OddClock(request.param)
    made, rows = DraftedCall.made, PackedRows.drafted

    def timed(stopwatch, *_, **__) -> None:
        stopwatch.clock = stopwatch.work = odd
        stopwatch.began = 0.0

    def odd_passes(call, passes):
        found = made(call, passes)
        return dataclasses.replace(
            found,
            passes=[
                dataclasses.replace(
                    one,
                    draft_seconds=[odd.step(each) for each in one.draft_seconds],
                    drafting=odd.step(one.drafting),
                    verifying=odd.step(one.verifying),
                )
                for one in found.passes
            ],
        )

    def odd_rows(packed, passes):
        found = rows(packed, passes)
        return dataclasses.replace(found, seconds=[odd.step(each) for each in found.seconds])

    monkeypatch.setattr(Stopwatch, "__init__", timed)
    monkeypatch.setattr(DraftedCall, "made", odd_passes)
    monkeypatch.setattr(PackedRows, "drafted", odd_rows)
    return odd


@pytest.fixture(params=["generic", "fused"], scope="module")
def model(request) -> AdaptiveModel:
    base = tiny_model("llama", layers=4, dtype=torch.float32)
    made = AdaptiveModel(base, [1, 2], executor=request.param)
    torch.manual_seed(0)
    made.attach_draft(DraftLayer(DraftLayerConfig(made.backbone.hidden_size, 4, 2, 8, 48, VOCAB)))
    return made


@pytest.mark.parametrize(
    "how",
    [{}, {"draft_tokens": 0, "lookup_tokens": 4}, {"draft_tokens": 0, "thresholds": 0.03}],
    ids=["layer", "looked-up", "exits"],
)
def test_exact_makes_denses_tokens_whatever_the_clock_says(model, clock, how):
    for rows in (1, 3) if "lookup_tokens" not in how else (1,):  # looked up for one sequence
        ids, given = random_ids(8, batch=rows), {"max_new_tokens": 40, "eos_token_id": None}
        dense = model.generate(ids, fidelity="dense", **given)
        assert torch.equal(model.generate(ids, fidelity="exact", **given, **how), dense)
    assert clock.reads > 40


def test_requests_of_an_engine_get_denses_tokens_whatever_the_clock_says(model, clock):
    found = {}
    for fidelity in ("dense", "exact"):
        engine = model.engine(max_running=3, clock=clock)
        spec = DecodingSpec(gate=False, fidelity=fidelity)
        numbers = [
            engine.add(Request(random_ids(6 + n, seed=n)[0], 24, spec=spec, end_tokens=()))
            for n in range(5)
        ]
        made = {number: [] for number in numbers}
        while engine.unfinished:
            for output in engine.step():
                made[output.id] += output.tokens
        found[fidelity] = [made[number] for number in numbers]
    assert found["exact"] == found["dense"] and all(len(one) == 24 for one in found["dense"])
