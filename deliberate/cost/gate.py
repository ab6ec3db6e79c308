"""What the rounds of a deliberation gate cost on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from deliberate.cost.parts import DeliberationCost, PassCost
from deliberate.engine.deliberation import GateRunner
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.utils.devices import synchronize

# Timed repetitions, of which the median counts.
_TRIES = 9
# Tokens of the larger of the two timed rounds.
_SEVERAL = 8


@torch.inference_mode()
def measure_rounds(
    gate: DeliberationGate,
    backbone: Backbone,
    *,
    context: int = 128,
    clock: Callable[[], float] = time.perf_counter,
) -> DeliberationCost:
    """Times a gate at this context, on this machine.

    A round is the first of its sequence: the time includes the keys of the history.
    """
    device = backbone.device
    hidden = torch.randn(1, context + 1, backbone.hidden_size, dtype=backbone.dtype, device=device)
    prompt = backbone.context(0, context, device=device)
    token = backbone.context(context, 1, device=device)
    newest = hidden[:, context:]
    logits = backbone.logits(newest[0])

    def timed(run: Callable[[GateRunner], object], *, remembered: bool) -> float:
        samples = []
        for _ in range(_TRIES):
            runner = GateRunner(gate, backbone, [])
            runner.open(1, 2 * context)
            runner.remember(hidden[:, :context], prompt)
            if remembered:
                runner.remember(newest, token)
            synchronize(device)
            began = clock()
            run(runner)
            synchronize(device)
            samples.append(clock() - began)
        return float(np.median(samples))

    def keep(runner: GateRunner) -> None:
        runner.remember(newest, token)
        runner.probabilities(logits)

    def rounds(tokens: int) -> Callable[[GateRunner], object]:
        state = newest[0].expand(tokens, -1).contiguous()
        return lambda runner: runner.round(state, [0] * tokens, [context] * tokens)

    remember = timed(keep, remembered=False)
    one = timed(rounds(1), remembered=True)
    each = max(0.0, timed(rounds(_SEVERAL), remembered=True) - one) / (_SEVERAL - 1)
    each = min(each, one)
    return DeliberationCost(remember, PassCost(one - each, per_row=each))
