"""Losses and schedules of early-exit training against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deliberate.config import IGNORE_INDEX
from deliberate.train.losses import (
    ExitScale,
    distillation_loss,
    exit_loss_weights,
    gate_loss,
    layer_dropout_rates,
    token_cross_entropy,
)
from deliberate.utils.errors import DeliberateError


@st.composite
def exit_layouts(draw):
    depth = draw(st.integers(2, 60))
    layers = draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=6))
    return sorted(layers), depth


FALLING = (ExitScale.INVERSE, ExitScale.INVERSE_SQUARE_ROOT)


@given(exit_layouts(), st.sampled_from(ExitScale), st.floats(0, 3))
def test_exit_weights_sum_to_one_and_follow_depth_one_way(layout, scale, early_scale):
    layers, depth = layout
    weights = exit_loss_weights(layers, depth, scale=scale, early_scale=early_scale)
    assert len(weights) == len(layers) + 1
    assert math.isclose(sum(weights), 1.0)
    early = weights[:-1]
    assert early == sorted(early, reverse=scale in FALLING) and min(early) >= 0
    if early_scale <= 1 and scale not in FALLING:
        assert weights[-1] == max(weights)


def test_exit_weights_follow_the_named_scale():
    def raw(scale):
        early, late, top = exit_loss_weights([2, 4], 8, scale=scale, early_scale=0.5)
        return pytest.approx([early / top, late / top])

    assert raw("uniform") == [0.5, 0.5]
    assert raw("linear") == [0.5 * 2 / 8, 0.5 * 4 / 8]
    assert raw("sqrt") == [0.5 * (2 / 8) ** 0.5, 0.5 * (4 / 8) ** 0.5]
    assert raw("cumulative") == [0.5 * 3 / 36, 0.5 * 10 / 36]
    assert raw("inverse") == [0.5 * 8 / 2, 0.5 * 8 / 4]
    assert raw("inverse_sqrt") == [0.5 * (8 / 2) ** 0.5, 0.5 * (8 / 4) ** 0.5]
    # The paper's top: its own depth, and what an exit one layer below would weigh.
    assert raw("layerskip") == [0.5 * 3 / (8 + 0.5 * 28), 0.5 * 10 / (8 + 0.5 * 28)]


@pytest.mark.parametrize("change", [{"scale": "cubic"}, {"early_scale": -0.1}])
def test_unknown_scales_and_negative_weights_are_refused(change):
    with pytest.raises(DeliberateError, match=str(next(iter(change.values())))):
        exit_loss_weights([1], 4, **({"scale": "linear", "early_scale": 1.0} | change))


@given(st.integers(2, 80), st.floats(0, 0.99))
def test_layer_dropout_rises_from_zero_to_its_maximum_as_layerskip_has_it(depth, p_max):
    rates = layer_dropout_rates(depth, p_max)
    assert rates[0] == 0.0
    assert math.isclose(rates[-1], p_max, abs_tol=1e-12)
    assert rates == sorted(rates)
    for layer, rate in enumerate(rates):
        expected = p_max * (math.exp(layer * math.log(2) / (depth - 1)) - 1)
        assert math.isclose(rate, expected, abs_tol=1e-12)


def test_a_single_layer_is_never_dropped():
    assert layer_dropout_rates(1, 0.5) == [0.0]


@pytest.mark.parametrize("p_max", [-0.1, 1.0, float("nan")])
def test_impossible_layer_dropout_is_refused(p_max):
    with pytest.raises(DeliberateError, match="layer dropout"):
        layer_dropout_rates(4, p_max)


def test_cross_entropy_is_a_sum_without_ignored_labels():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, IGNORE_INDEX, 0, 6])
    by_hand = sum(
        math.log(sum(math.exp(v) for v in row)) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
        if label != IGNORE_INDEX
    )
    assert token_cross_entropy(logits, labels).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_is_the_divergence_from_the_teacher_times_the_squared_temperature(
    temperature,
):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 5, 9, generator=generator).unbind()

    def softmax(row):
        powers = [math.exp(v / temperature) for v in row]
        return [power / sum(powers) for power in powers]

    by_hand = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        for s, t in zip(softmax(s_row), softmax(t_row), strict=True):
            by_hand += t * math.log(t / s) * temperature**2
    got = distillation_loss(student, teacher, temperature=temperature)
    assert got.item() == pytest.approx(by_hand, rel=1e-4)
    same = distillation_loss(teacher + 3.0, teacher, temperature=temperature)
    assert same.item() == pytest.approx(0.0, abs=1e-5)


def test_distillation_needs_a_positive_temperature():
    with pytest.raises(DeliberateError, match="temperature 0"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0)


def test_gate_loss_is_binary_cross_entropy_on_agreement():
    logits = [-2.0, 0.0, 3.0]
    agrees = [True, False, True]
    by_hand = -sum(
        math.log(p if agree else 1 - p)
        for p, agree in zip((1 / (1 + math.exp(-v)) for v in logits), agrees, strict=True)
    )
    got = gate_loss(torch.tensor(logits), torch.tensor(agrees))
    assert got.item() == pytest.approx(by_hand, rel=1e-5)
