"""A made-up cost model whose weights warm up in the processor's cache."""

from __future__ import annotations

from deliberate.cost.model import CostModel
from deliberate.cost.parts import PassCost, SegmentCost, WarmCost


def warm_cost_model(memory: float) -> CostModel:
    segment = SegmentCost(
        single=WarmCost(PassCost(6e-4, per_key=2e-7), saved=3e-4),
        several=WarmCost(PassCost(7e-4, 3e-5, 4e-7, 2e-8), saved=2e-4),
        prompt=PassCost(7e-4, 2e-5, 0.0, 2e-8),
    )
    read = WarmCost(PassCost(1e-4, 1e-5), saved=4e-5)
    head = PassCost(1e-4, 5e-6)
    return CostModel((2, 4, 6), 8, (segment,) * 4, (read,) * 3, head, 2e-5, memory)
