"""Which exits pay: break-even exit rates from measured costs.

These generalise the layer-count rules of early exiting to seconds. In layers, with head cost lambda
and score cost s, reading an exit after e of L layers with the full head pays from an exit rate of
(lambda + s) / (L - e + lambda) on, behind a gate of cost g from (g + s) / (L - e) on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from deliberate.config import MAX_CALL_STEPS
from deliberate.cost.model import TYPICAL_CONTEXT, CostModel, duration
from deliberate.cost.parts import MultiStepCost
from deliberate.utils.errors import DeliberateError


def break_even_rate(
    cost: CostModel,
    k: int,
    *,
    beyond: int | None = None,
    context: float = TYPICAL_CONTEXT,
    deferred: bool = True,
    multi_step: bool = False,
) -> float:
    """Least share of the tokens evaluated at exit k that must exit there for it to pay.

    Args:
        k: exit, from 0.
        beyond: where those tokens would be chosen otherwise: a later exit, or the number of exits
            (the default) for full depth, as in the published rules.
        deferred: the layers above are run later, in a pass over several tokens, and not skipped.
        ahead: exit k is the first that is evaluated, and the executor takes several steps in one
            call up to it: every token that does not exit ends such a call.

    Returns:
        A share in [0, 1], or infinity where the exit cannot pay at any rate.
    """
    top = cost.num_exits
    target = top if beyond is None else beyond
    if not 0 <= k < target <= top:
        raise DeliberateError(f"exit {k} and {target}: two places in order within 0..{top}")
    layers = sum(
        cost.passed_on_seconds(j, context) if deferred else cost.segment_seconds(j, context=context)
        for j in range(k + 1, target + 1)
    )
    there = cost.answer_seconds
    if target < top:
        there = cost.read_seconds(target) + (cost.head_seconds if cost.gated else 0.0)
    saved = layers + there - (cost.head_seconds if cost.gated else 0.0)
    evaluation = cost.read_seconds(k)
    if multi_step and deferred and cost.multi_step is not None:
        return _multi_step_rate(cost, cost.multi_step, k, target, context, layers + there)
    if evaluation == 0:
        return 0.0
    return evaluation / saved if saved >= evaluation else math.inf


def _multi_step_rate(
    cost: CostModel, multi_step: MultiStepCost, k: int, target: int, context: float, on: float
) -> float:
    """Break-even rate where steps come several in one call, as they do at both places.

    With rate p a token costs ``step_k + deferred + (1 - p) (call_k + on)``, `on` being what is run
    for one that does not exit. Without exit k it costs the target's step with its own deferred
    layers, and at full depth its share of a call. What the calls of a target that is an exit cost
    is left out, which favours the target.
    """
    there = multi_step.step_seconds(target, context)
    if target == cost.num_exits:
        there += multi_step.calls[target] / MAX_CALL_STEPS
    above = range(k + 1, target + 1)
    here = multi_step.step_seconds(k, context) + sum(
        cost.deferred_seconds(j, context) for j in above
    )
    ends = multi_step.calls[k] + on
    if here >= there:
        return math.inf
    return min(1.0, max(0.0, 1.0 - (there - here) / ends)) if ends > 0 else 0.0


def drop_unprofitable(
    cost: CostModel,
    rates: Sequence[float],
    *,
    context: float = TYPICAL_CONTEXT,
    deferred: bool = True,
) -> tuple[tuple[int, ...], list[str]]:
    """Exits that pay on this machine, and one sentence for each other that says why not.

    An exit is compared with exiting at the next one kept. The exit that is furthest below its
    break-even rate is dropped first; the tokens that exited there are then evaluated at the next.

    Args:
        rates: share of the tokens evaluated at each exit that exit there, ``[K]``.

    Returns:
        Layers of the exits kept, possibly none, and one sentence per exit dropped.
    """
    if len(rates) != cost.num_exits:
        raise DeliberateError(f"{len(rates)} exit rates for {cost.num_exits} exits: give one each")
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise DeliberateError(f"exit rate {rate} is outside [0, 1]")
    kept = list(range(cost.num_exits))
    share = [float(rate) for rate in rates]
    reasons: list[str] = []
    while kept:
        nexts = [*kept[1:], cost.num_exits]
        needed = {
            k: break_even_rate(
                cost, k, beyond=beyond, context=context, deferred=deferred, multi_step=k == kept[0]
            )
            for k, beyond in zip(kept, nexts, strict=True)
        }
        worst = min(kept, key=lambda k: share[k] - needed[k])
        if share[worst] >= needed[worst]:
            break
        reasons.append(_dropped(cost, worst, share[worst], needed[worst]))
        follower = nexts[kept.index(worst)]
        if follower < cost.num_exits:
            share[follower] = share[worst] + (1 - share[worst]) * share[follower]
        kept.remove(worst)
    return tuple(cost.layers[k] for k in kept), reasons


def paying_exits(cost: CostModel) -> Callable[[Sequence[float]], list[bool]]:
    """Which exits pay at given exit rates, as `deliberate.calibration.stopping_policy.fit_policy`
    needs it."""

    def pays(rates: Sequence[float]) -> list[bool]:
        kept, _ = drop_unprofitable(cost, rates)
        return [layer in kept for layer in cost.layers]

    return pays


def _dropped(cost: CostModel, k: int, rate: float, needed: float) -> str:
    when = "it pays at no rate" if math.isinf(needed) else f"it pays from {_percent(needed)} on"
    return (
        f"exit after layer {cost.layers[k]}: {_percent(rate)} of tokens exit; at "
        f"{duration(cost.read_seconds(k))} per read {when}: dropped"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
