"""What is logged of exits while training: calibration error and the speed that they promise.

All from teacher-forced tokens of training batches: a guide while a run goes on, not a measurement
of a decoder (the `bench` and `eval` commands take those).
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
    """Cost of reading the LM head in layers: decoding is bound by the weights that it reads."""
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
    """Dense cost per token over that with exits whose tokens agree at rate `target`.

    Each exit gets, shallow to deep, the least threshold that reaches the target among the tokens
    that come to it. One whose tokens save less than asking all of them costs is left out, so the
    result is at least 1. Counted in layers run plus what reading exits costs, with every deferred
    layer for free: an upper estimate.

    Args:
        confidence, agrees: ``[N, K]``, one column per exit.
        layers: the K exit layers.
        num_layers: depth of the model.
        head: cost of the LM head at the top, in layers.
        read: cost of asking one exit, in layers (the head's, or next to 0 for a gate).
    """
    if len(confidence) == 0:
        return 1.0
    staying = torch.ones(len(confidence), dtype=torch.bool)
    cost = torch.full((len(confidence),), num_layers + head, dtype=torch.float64)
    asked = torch.zeros((), dtype=torch.float64)
    for column, agreed, layer in zip(
        confidence.unbind(dim=1), agrees.bool().unbind(dim=1), layers, strict=True
    ):
        if not bool(staying.any()):
            break
        threshold = least_threshold(column[staying], agreed[staying], target)
        if threshold >= NEVER:
            continue
        leaves = staying & (column >= threshold)
        if int(leaves.sum()) * (num_layers - layer) <= int(staying.sum()) * read:
            continue
        asked = asked + int(staying.sum()) * read
        # A probability is the head's own: leaving with it costs no further head, as the top does.
        cost[leaves] = layer + max(head - read, 0.0)
        staying = staying & ~leaves
    return float(len(cost) * (num_layers + head) / (cost.sum() + asked))
