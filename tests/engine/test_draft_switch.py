"""Exact mode drafts where that is faster, and loses little where it is not."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftLengths, DraftPrior
from deliberate.engine.draft_switch import BEFORE, LONGEST_OFF, OFF, PROBE, DraftSwitch
from deliberate.engine.layer_drafts import LayerDrafts
from deliberate.engine.ngram_drafts import CALL_PASSES, NgramDrafts
from deliberate.modeling.draft_layer import DraftLayer, DraftLayerConfig


class Plant:
    """Passes of a machine: one of a token takes 1, one with drafts `slower`, with noise."""

    def __init__(self, switch: DraftSwitch, accepted: float, slower: float, seed: int = 0) -> None:
        self.switch, self.accepted, self.slower = switch, accepted, slower
        self.dice = random.Random(seed)
        self.seconds = self.tokens = self.drafted = 0.0

    def run(self, tokens: int) -> Plant:
        end = self.tokens + tokens
        while self.tokens < end:
            on = self.switch.on()
            made, seconds = 1, self.dice.gauss(1.0, 0.03)
            if on:
                while made < 7 and self.dice.random() < self.accepted:
                    made += 1
                seconds *= self.slower
            self.switch.note(seconds, made, drafting=on)
            self.seconds += seconds
            self.tokens += made
            self.drafted += made * on
        return self


def mean_tokens(accepted: float) -> float:
    return sum(accepted**n for n in range(7))


@pytest.mark.parametrize("loss", [1.02, 1.1, 1.3, 2.0])
@pytest.mark.parametrize("accepted", [0.2, 0.5])
def test_drafting_that_loses_costs_at_most_three_per_cent(loss, accepted):
    for seed in range(8):
        plant = Plant(DraftSwitch(), accepted, loss * mean_tokens(accepted), seed)
        plant.run(4000)
        assert plant.seconds / plant.tokens < 1.02, seed
    first = [
        Plant(DraftSwitch(), accepted, loss * mean_tokens(accepted), seed).run(300)
        for seed in range(40)
    ]
    share = sum(one.seconds for one in first) / sum(one.tokens for one in first)
    assert share < (1.03 if loss <= 1.1 else 1.06)


@pytest.mark.parametrize("gain", [0.9, 0.7, 0.5])
def test_drafting_that_gains_goes_on(gain):
    for seed in range(8):
        plant = Plant(DraftSwitch(), 0.5, gain * mean_tokens(0.5), seed).run(4000)
        assert plant.drafted / plant.tokens > (0.7 if gain == 0.9 else 0.9)


def test_a_text_that_drafts_suit_is_found_out():
    plant = Plant(DraftSwitch(), 0.3, 1.4 * mean_tokens(0.3)).run(6000)
    plant.accepted, plant.slower, plant.drafted = 0.7, 0.6 * mean_tokens(0.7), 0.0
    begun = plant.tokens
    plant.run(LONGEST_OFF + 128)
    assert plant.drafted > 64
    plant.run(2000)
    assert plant.drafted / (plant.tokens - begun) > 0.5


def test_interruptions_of_the_machine_do_not_switch_drafting_off():
    switch = DraftSwitch()
    plant = Plant(switch, 0.5, 0.7 * mean_tokens(0.5)).run(200)
    for _ in range(5):
        switch.note(300.0, 2, drafting=True)
        plant.run(100)
    assert plant.drafted / plant.tokens > 0.9


def test_sequences_that_share_passes_are_judged_together():
    switch = DraftSwitch(rows=8)
    for _ in range(BEFORE):
        assert all(switch.on() for _ in range(8))
        for _ in range(8):
            switch.note(2.0, 1, drafting=True)
    assert switch.probing and switch.off_passes == 8 * PROBE
    for _ in range(8 * PROBE):
        assert not switch.on()
        switch.note(1.0, 1, drafting=False)
    for _ in range(9):  # 3 tokens of one sequence are 8.5 of eight
        assert switch.on()
        switch.note(2.0, 1, drafting=True)
    assert not switch.probing and switch.off_passes == 8 * OFF


class Never:
    """Runs no layer."""

    def new_cache(self):
        raise AssertionError("the layer is off")


def test_while_the_layer_loses_drafts_are_looked_up_and_while_time_is_measured_they_are_not():
    lengths, text = DraftLengths(DraftPrior(), 4), [5, 6, 7, 8] * 4
    lookup = NgramDrafts(4)
    source = LayerDrafts(Never(), lengths, lookup=lookup)
    lengths.switch._off = 4
    source.saw(0, torch.zeros(len(text) - 1, 1))
    assert source.propose(text, 8) and source.plain_passes == 1
    lengths.switch.probing = True
    assert source.propose(text, 8) == [] and source.plain_passes == 3
    source.note_single(1.0, 3)
    assert lengths.switch.off_passes == 0 and lengths.switch.plain.tokens == 3
    lengths.switch._off = lengths.lookup_switch._off = 30
    lengths.switch.probing = False
    assert source.propose(text, 8) == [] and source.plain_passes == CALL_PASSES


def test_switched_on_and_off_at_random_the_layer_misses_no_state_and_the_output_stays(monkeypatch):
    model = AdaptiveModel(tiny_model("llama", layers=4, dtype=torch.float32), [1, 2])
    torch.manual_seed(0)
    layer = DraftLayer(DraftLayerConfig(model.backbone.hidden_size, 4, 2, 8, 48, VOCAB))
    model.attach_draft(layer)
    dice, begun, calls = random.Random(0), [], []

    def on(switch):
        switch._off = max(0, switch._off - 1) if switch._off else dice.choice([0, 0, 5])
        return switch._off == 0

    start_at, plain = LayerDrafts._start_at, LayerDrafts.note_single
    monkeypatch.setattr(DraftSwitch, "on", on)
    # States are dropped while measured times make the layer wait: none may decide that here.
    monkeypatch.setattr(DraftSwitch, "_count", lambda *_: None)
    monkeypatch.setattr(DraftLengths, "pays", True)
    monkeypatch.setattr(
        LayerDrafts, "_start_at", lambda one, at: (begun.append(at), start_at(one, at))[1]
    )
    monkeypatch.setattr(
        LayerDrafts,
        "note_single",
        lambda one, seconds, passes=1: (calls.append(passes), plain(one, seconds, passes))[1],
    )
    for seed in range(4):
        prompt = random_ids(6, seed=seed)
        dense = model.generate(prompt, max_new_tokens=60, fidelity="dense")
        assert model.generate(prompt, max_new_tokens=60).tolist() == dense.tolist()
    assert set(begun) == {0}
    assert max(calls) > 1  # passes without drafts are one call
