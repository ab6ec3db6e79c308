"""Figures of exits that are logged while training: calibration error and expected speed.

Computed from teacher-forced tokens of training batches: a guide during a run, not a measurement of
decoding (see the commands `bench` and `eval`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deliberate.calibration.thresholds import NEVER, least_threshold

SPEED_TARGET = 0.99
"""Agreement at which the expected speed is logged."""


def calibration_error(confidence: Tensor, agrees: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599) of one exit, in [0, 1].

    The mean over tokens of ``|share that agrees - mean confidence|`` in `bins` equal-width bins.

    Args:
        confidence: ``[N]`` in [0, 1].
        agrees: ``[N]`` bool.
    """
    if len(confidence) == 0:
        return 0.0
    place = (confidence.double() * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, place, agrees.double() - confidence.double())
    return float(gap.abs().sum() / len(confidence))


def head_cost(lm_head: nn.Module, layers: nn.ModuleList) -> float:
    """Cost of evaluating the LM head, in layers, by the number of weights that each reads."""
    of_layers = sum(p.numel() for layer in layers for p in layer.parameters()) / len(layers)
    return sum(p.numel() for p in lm_head.parameters()) / of_layers


def expected_speed(
    confidence: Tensor,
    agrees: Tensor,
    layers: Sequence[int],
    num_layers: int,
    *,
    head: float,
    read: float,
    target: float = SPEED_TARGET,
) -> float:
    """Dense cost per token divided by the cost with early exits that agree at rate `target`.

    From the first exit to the last, each gets the least threshold that reaches the target among
    the tokens that reach it. An exit that saves less than its evaluation costs is left out, so the
    result is at least 1. The cost is counted in layers, evaluation of the exits included; deferred
    layers cost nothing, which makes it an upper estimate.

    Args:
        confidence, agrees: ``[N, K]``, one column per exit.
        layers: the K exit layers.
        num_layers: depth of the model.
        head: cost of the LM head at the last layer, in layers.
        read: cost of evaluating one exit, in layers (that of the head; about 0 for an exit gate).
    """
    if len(confidence) == 0:
        return 1.0
    remaining = torch.ones(len(confidence), dtype=torch.bool)
    cost = torch.full((len(confidence),), num_layers + head, dtype=torch.float64)
    evaluation = torch.zeros((), dtype=torch.float64)
    for column, agreed, layer in zip(
        confidence.unbind(dim=1), agrees.bool().unbind(dim=1), layers, strict=True
    ):
        if not bool(remaining.any()):
            break
        threshold = least_threshold(column[remaining], agreed[remaining], target)
        if threshold >= NEVER:
            continue
        exiting = remaining & (column >= threshold)
        if int(exiting.sum()) * (num_layers - layer) <= int(remaining.sum()) * read:
            continue
        evaluation = evaluation + int(remaining.sum()) * read
        # A confidence from the head has evaluated the head already; a gate's has not.
        cost[exiting] = layer + max(head - read, 0.0)
        remaining = remaining & ~exiting
    return float(len(cost) * (num_layers + head) / (cost.sum() + evaluation))
