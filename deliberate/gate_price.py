"""What thinking costs and when it pays: the deliberation gate under the price of the policy.

The price is that of `deliberate.policy`: seconds that one avoided wrong token is worth. A band is a
threshold on the top's probability, as an exit's is, so both answer to the same scalar.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from deliberate.backbone import Backbone
from deliberate.errors import DeliberateError
from deliberate.gate import DeliberationGate
from deliberate.gate_runner import GateRunner

# Timed repetitions, of which the median counts.
_TRIES = 9


@dataclass(frozen=True)
class ThinkingCost:
    """Seconds of a gate for one token.

    Attributes:
        remember: paid by every token: its place in the memory, and the top's probability.
        round: one round, the keys of the token and the head after it included.
    """

    remember: float
    round: float

    def __post_init__(self) -> None:
        for name in ("remember", "round"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DeliberateError(f"gate {name} = {value} s must be finite and at least 0")

    def seconds(self, tokens: int, rounds: int) -> float:
        """Of a generation: tokens that reached the top, and rounds that they took together."""
        return tokens * self.remember + rounds * self.round


@torch.inference_mode()
def measure_thinking(
    gate: DeliberationGate,
    backbone: Backbone,
    *,
    context: int = 128,
    clock: Callable[[], float] = time.perf_counter,
) -> ThinkingCost:
    """Times one token's memory and one round of it at this context, on this machine."""
    like = next(backbone.norm.parameters())
    hidden = torch.randn(
        1, context + _TRIES + 1, backbone.hidden_size, dtype=like.dtype, device=like.device
    )
    runner = GateRunner(gate, backbone, [])
    device = backbone.device
    runner.begin([context], hidden[:, :context], backbone.context(0, context, device=device))
    runner.round(hidden[0, context - 1 : context], [0], [context - 1])  # writes the prompt's keys
    remember, rounds = [], []
    for place in range(context, context + _TRIES):
        state = hidden[:, place : place + 1]
        ctx = backbone.context(place, 1, device=device)
        began = clock()
        runner.remember(state, ctx)
        read = runner.probabilities(backbone.logits(state[0]))
        between = clock()
        runner.round(state[0], [0], [place])[0].sum().item()  # waits for the device
        ended = clock()
        remember.append(between - began)
        rounds.append(ended - between)
        assert len(read) == 1
    return ThinkingCost(float(np.median(remember)), float(np.median(rounds)))


def best_band(
    probability: NDArray[np.floating],
    helped: NDArray[np.floating],
    *,
    round_seconds: float,
    price: float,
) -> float:
    """The `think_below` that is worth most at a price, 0 where no band pays.

    Args:
        probability: ``[T]`` of the top before any round, of recorded tokens.
        helped: ``[T]`` right after the rounds less right before them: 1, 0 or -1.
        round_seconds: what the rounds of one token cost.
        price: seconds that one wrong token avoided is worth.

    Raises:
        DeliberateError: arrays that do not match, or a negative price or cost.
    """
    if probability.shape != helped.shape or probability.ndim != 1:
        raise DeliberateError(
            f"{probability.shape} probabilities for {helped.shape} outcomes: give one of each"
        )
    if not (price >= 0 and round_seconds >= 0):
        raise DeliberateError(f"price {price} and round_seconds {round_seconds} must be at least 0")
    order = np.argsort(probability, kind="stable")
    sorted_p = probability[order].astype(np.float64)
    worth = np.cumsum(price * helped[order].astype(np.float64) - round_seconds)
    # Equal probabilities think together: a band can end only behind the last of them.
    ends = np.append(sorted_p[1:] != sorted_p[:-1], True) if len(sorted_p) else np.zeros(0, bool)
    if not ends.any() or worth[ends].max() <= 0:
        return 0.0
    best = int(np.flatnonzero(ends)[np.argmax(worth[ends])])
    return float(np.nextafter(sorted_p[best], np.inf))
