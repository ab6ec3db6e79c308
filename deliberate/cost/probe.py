"""Whether a measured cost model is still, or ever was, what this machine takes.

A measurement made while other programs had the processor is too slow for good. Its noise is stored
with it, and a probe of a few full-depth steps compares it with the machine as it is now.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deliberate.cost.fit import TimedPart
from deliberate.cost.model import CostModel
from deliberate.cost.parts import DeliberationCost, MultiStepCost, PassCost, SegmentCost, WarmCost
from deliberate.modeling.backbone import Backbone
from deliberate.utils.devices import synchronize

# A measurement is noisy where a part's upper quartile is so much above its fastest run.
NOISY = 0.3
# A probe at most this share of the model's seconds: the machine was busy when it was measured.
FASTER = 0.75
# A noisy measurement is made again so many times, where the machine is not busy still.
ATTEMPTS = 3
_CONTEXT, _STEPS = 64, 8


def noise_of(parts: Sequence[TimedPart]) -> float:
    """How far the upper quartile of a part's times is above its fastest, in the median over parts.

    0 where no part was timed more than once.
    """
    found = []
    for part in parts:
        ordered = sorted(part.samples)
        if len(ordered) > 1 and ordered[0] > 0:
            found.append(ordered[int(0.75 * (len(ordered) - 1) + 0.5)] / ordered[0] - 1.0)
    return statistics.median(found) if found else 0.0


def conditions_now(device: torch.device) -> dict[str, Any]:
    """Load of the machine beside a measurement, JSON-ready; nothing where it cannot be known."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return {}
    return {"load": round(os.getloadavg()[0], 2), "cores": os.cpu_count() or 1}


def is_noisy(facts: Mapping[str, Any]) -> bool:
    """Whether a measurement says of itself that the machine was busy."""
    load, cores = facts.get("load", 0.0), facts.get("cores", 1)
    return bool(facts.get("noise", 0.0) > NOISY or load > cores)


@torch.inference_mode()
def probe(
    cost: CostModel, backbone: Backbone, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a full-depth step now, at its fastest, over those of the cost model."""
    context = _CONTEXT if backbone.max_positions is None else min(
        _CONTEXT, backbone.max_positions - _STEPS - 2
    )  # fmt: skip
    device = backbone.device
    cache = backbone.new_cache(context + 1)
    ids = torch.zeros((1, context), dtype=torch.int64, device=device)
    ctx = backbone.context(0, context, device=device)
    backbone.run_layers(backbone.embed(ids, ctx), 0, backbone.num_layers, ctx, cache)
    best = float("inf")
    for _ in range(_STEPS):
        cache.crop(context, 0)
        synchronize(device)
        began = clock()
        ctx = backbone.pass_context([0], [context], [1], batch=1)
        hidden = backbone.embed(ids[:, :1], ctx)
        hidden = backbone.run_layers(hidden, 0, backbone.num_layers, ctx, cache)
        backbone.logits(hidden[:, -1]).argmax().item()
        synchronize(device)
        best = min(best, clock() - began)
    predicted = cost.restricted(()).dense_seconds_per_token(context) - cost.remember_seconds
    return best / predicted if predicted > 0 else 1.0


def scaled(cost: CostModel, factor: float) -> CostModel:
    """The same machine with every time multiplied by a factor; its facts say so."""

    def times(value: Any) -> Any:
        if isinstance(value, float):
            return value * factor
        if isinstance(value, tuple):
            return tuple(map(times, value))
        if isinstance(value, PassCost | WarmCost | SegmentCost | DeliberationCost | MultiStepCost):
            names = [field.name for field in dataclasses.fields(value)]
            return type(value)(*(times(getattr(value, name)) for name in names))
        return value

    timed = ("segments", "reads", "head", "step", "deliberation", "multi_step")
    return dataclasses.replace(
        cost,
        facts=dict(cost.facts) | {"corrected": factor},
        **{name: times(getattr(cost, name)) for name in timed},
    )
