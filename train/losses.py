"""Losses and schedules of early-exit training, as small pure functions.

LayerSkip (Elhoushi et al., 2024, arXiv:2404.16710) trains one model whose every exit shares the
final norm and LM head: cross-entropy at the exits, weighted by depth, with layer dropout that grows
with depth so that early layers do not rely on later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from deliberate.utils.errors import DeliberateError


class ExitScale(StrEnum):
    """How the weight of an exit's loss grows with its depth."""

    UNIFORM = "uniform"
    LINEAR = "linear"
    SQUARE_ROOT = "sqrt"
    CUMULATIVE = "cumulative"  # 1 + 2 + ... + depth
    # Cumulative at the exits; at the last layer: its depth + early_scale * the rest.
    LAYERSKIP = "layerskip"
    INVERSE = "inverse"
    INVERSE_SQUARE_ROOT = "inverse_sqrt"


def exit_loss_weights(
    layers: Sequence[int], num_layers: int, *, scale: ExitScale | str, early_scale: float
) -> list[float]:
    """Weights of the losses at the exit `layers` and at the last layer, in this order; sum 1.

    The weight of an exit is proportional to ``early_scale`` times the scale's value at its depth,
    that of the last layer to the scale's value. The paper's scale is ``layerskip``: ``early_scale *
    (1 + ... + depth)`` at an exit and ``L + early_scale * (1 + ... + (L - 1))`` at the last layer.
    Its sums start at layer index 0; depths are counted from 1 here, so that an exit after the first
    layer has a weight too. The other scales are torchtune's.

    Raises:
        DeliberateError: `early_scale` is negative, or the scale is unknown.
    """
    if early_scale < 0:
        raise DeliberateError(f"early_scale {early_scale} must not be negative")
    try:
        kind = ExitScale(scale)
    except ValueError:
        choices = ", ".join(ExitScale)
        raise DeliberateError(f"loss scale {scale!r} is unknown; it is one of {choices}") from None
    value = {
        ExitScale.UNIFORM: lambda depth: 1.0,
        ExitScale.LINEAR: lambda depth: float(depth),
        ExitScale.SQUARE_ROOT: lambda depth: depth**0.5,
        ExitScale.CUMULATIVE: _sum_to,
        ExitScale.LAYERSKIP: _sum_to,
        ExitScale.INVERSE: lambda depth: 1.0 / depth,
        ExitScale.INVERSE_SQUARE_ROOT: lambda depth: depth**-0.5,
    }[kind]
    last = value(num_layers)
    if kind is ExitScale.LAYERSKIP:
        last = num_layers + early_scale * _sum_to(num_layers - 1)
    raw = [early_scale * value(layer) for layer in layers] + [last]
    total = sum(raw)
    return [weight / total for weight in raw]


def _sum_to(depth: int) -> float:
    return depth * (depth + 1) / 2


def layer_dropout_rates(num_layers: int, p_max: float) -> list[float]:
    """LayerSkip's rates p_l = p_max (2^(l/(L-1)) - 1): 0 at the first layer, p_max at the last.

    Raises:
        DeliberateError: `p_max` outside [0, 1).
    """
    if not 0.0 <= p_max < 1.0:
        raise DeliberateError(f"layer dropout p_max {p_max} is outside [0, 1)")
    if num_layers == 1:
        return [0.0]
    return [p_max * (2 ** (layer / (num_layers - 1)) - 1) for layer in range(num_layers)]


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats of ``logits [N, V]`` (upcast to float32) on ``labels [N]``."""
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Summed KL(teacher || student) at a temperature, times its square (Hinton et al., 2015).

    Args:
        student, teacher: logits ``[N, V]``; upcast to float32.
        temperature: above 0; a higher one flattens the teacher's distribution.
    """
    if temperature <= 0:
        raise DeliberateError(f"distillation temperature {temperature} must be above 0")
    divergence = functional.kl_div(
        torch.log_softmax(student.float() / temperature, dim=-1),
        torch.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return divergence * temperature**2


def gate_loss(gate_logits: Tensor, agrees: Tensor) -> Tensor:
    """Summed binary cross-entropy of gate log-odds ``[N]`` on whether the exit agreed ``[N]``."""
    return functional.binary_cross_entropy_with_logits(
        gate_logits.float(), agrees.float(), reduction="sum"
    )
