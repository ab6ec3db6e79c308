"""Figures logged while training against slow loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deliberate.train.metrics import calibration_error, expected_speed, head_cost


def sample(seed, tokens, exits):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(tokens, exits, generator=generator)
    return confidence, torch.rand(tokens, exits, generator=generator) < confidence


@given(st.integers(0, 10**6), st.integers(1, 200))
def test_calibration_error_equals_a_slow_reference(seed, tokens):
    confidence, agrees = sample(seed, tokens, 1)
    bins = [[] for _ in range(15)]
    for p, hit in zip(confidence[:, 0].tolist(), agrees[:, 0].tolist(), strict=True):
        bins[min(14, int(p * 15))].append((p, hit))
    gaps = [
        len(b) * abs(sum(h for _, h in b) / len(b) - sum(p for p, _ in b) / len(b))
        for b in bins
        if b
    ]
    got = calibration_error(confidence[:, 0], agrees[:, 0])
    assert got == pytest.approx(sum(gaps) / tokens, abs=1e-6)


def test_calibration_error_of_sure_and_right_is_zero_and_of_sure_and_wrong_is_one():
    sure = torch.ones(8)
    assert calibration_error(sure, torch.ones(8, dtype=torch.bool)) == 0.0
    assert calibration_error(sure, torch.zeros(8, dtype=torch.bool)) == 1.0
    assert calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == 0.0


def test_the_head_costs_its_share_of_a_layers_weights():
    layers = nn.ModuleList([nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False)])
    assert head_cost(nn.Linear(4, 24, bias=False), layers) == pytest.approx(96 / 48)


def test_expected_speed_counts_layers_and_reads():
    # Half the tokens leave after 2 of 8 layers, surely and rightly; the others never.
    confidence = torch.tensor([[0.99]] * 50 + [[0.1]] * 50)
    agrees = torch.tensor([[True]] * 50 + [[False]] * 50)
    got = expected_speed(confidence, agrees, [2], 8, head=1.0, read=1.0)
    # Leaving: 2 layers and the read. Staying: the read, 8 layers and the head.
    assert got == pytest.approx(9 / ((3 + 10) / 2))
    gated = expected_speed(confidence, agrees, [2], 8, head=1.0, read=0.0)
    assert gated == pytest.approx(9 / ((3 + 9) / 2))


def test_an_exit_that_cannot_pay_is_left_out():
    confidence = torch.tensor([[0.99]] * 5 + [[0.1]] * 95)
    agrees = confidence > 0.5
    assert expected_speed(confidence, agrees, [2], 8, head=4.0, read=4.0) == 1.0
    assert expected_speed(confidence, agrees, [2], 8, head=4.0, read=0.1) > 1.0


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 120), st.floats(0, 3))
def test_expected_speed_lies_between_dense_and_leaving_always_at_the_first_exit(seed, n, head):
    confidence, agrees = sample(seed, n, 3)
    for read in (head, 0.0):
        speed = expected_speed(confidence, agrees, [2, 4, 6], 8, head=head, read=read)
        assert 1.0 - 1e-9 <= speed <= (8 + head) / (2 + head) + 1e-9
    never = torch.zeros_like(agrees)
    nothing = expected_speed(confidence, never, [2, 4, 6], 8, head=head, read=head)
    assert nothing == pytest.approx(1.0)
