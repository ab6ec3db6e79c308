"""Thresholds from teacher-forced agreement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.thresholds import (
    NEVER,
    choose_thresholds,
    least_threshold,
    thresholds_in_turn,
)
from deliberate.utils.errors import DeliberateError

samples = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8, 0.9, 1.0]), st.booleans()),
    min_size=1,
    max_size=60,
)


@given(samples, st.floats(0.1, 1.0))
def test_the_threshold_is_the_least_that_reaches_the_target(sample, target):
    confidence = torch.tensor([c for c, _ in sample])
    agrees = torch.tensor([a for _, a in sample])

    def rate(threshold):
        leaves = confidence >= threshold
        return agrees[leaves].double().mean().item() if leaves.any() else None

    found = least_threshold(confidence, agrees, target)
    reached = [t for t in confidence.unique().tolist() if rate(t) >= target]
    if reached:
        assert found == min(reached)
        assert rate(found) >= target
    else:
        assert found == NEVER


def test_a_target_outside_its_range_is_refused():
    with pytest.raises(DeliberateError, match=r"0.0 is outside"):
        least_threshold(torch.tensor([0.5]), torch.tensor([True]), 0.0)


def test_later_exits_are_judged_on_what_is_left():
    model = AdaptiveModel(tiny_model("llama", layers=6), [2, 5])
    ids = random_ids(40, batch=4)
    labels = ids.clone()
    labels[:, :5] = -100
    batches = [{"input_ids": ids, "labels": labels}]
    first, second = choose_thresholds(model, batches, 0.05)
    reader, backbone = model.reader(), model.backbone
    with torch.no_grad():
        states = model(ids, output_exit_states=True)
        # the hidden state at position t predicts t + 1, whose label must be a target
        rows = [h[:, 4:-1].reshape(-1, h.shape[-1]) for h in (*states.exits, states.last)]
        top = backbone.logits(rows[-1]).argmax(-1)
        token0, sure0 = reader.score(0, backbone.norm(rows[0]))
        token1, sure1 = reader.score(1, backbone.norm(rows[1]))
    assert first == least_threshold(sure0.float(), token0 == top, 0.05)
    left = sure0.float() < first
    if left.any():
        assert second == least_threshold(sure1.float()[left], (token1 == top)[left], 0.05)


def test_an_agreement_equal_to_the_target_is_enough():
    confidence = torch.linspace(1.0, 0.1, 10)
    agrees = torch.tensor([True] * 7 + [False] * 3)  # 7 of 10; 10 * 0.7 is not 7 in binary
    assert least_threshold(confidence, agrees, 0.7) == float(confidence[-1])


def test_a_token_at_an_exits_threshold_does_not_come_to_the_next():
    sure = torch.tensor([0.9, 0.9, 0.2, 0.2])
    first = torch.tensor([True, True, False, False])
    second = torch.tensor([False, False, True, True])
    # Of the two tokens that remain both agree; with the first two the second exit would have none.
    assert thresholds_in_turn([sure, torch.ones(4)], [first, second], 1.0) == pytest.approx(
        (0.9, 1.0)
    )
