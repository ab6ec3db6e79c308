"""Which layer gets which storage: the least loss that fits a budget of bytes.

Losses are measured one layer at a time and taken to add up, so the choice is a multiple-choice
knapsack problem (HAWQ-V3, arXiv:2011.10680), solved exactly. Whether they add up is for whoever
applies the plan to measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from deliberate.utils.errors import DeliberateError


def assign(
    sizes: Sequence[Mapping[str, float]], losses: Sequence[Mapping[str, float]], budget: float
) -> tuple[str, ...]:
    """The storage of each unit (a layer, the head) with the smallest sum of losses.

    Args:
        sizes: bytes of each unit by storage.
        losses: what each unit loses by storage, whatever the others have; the same storages.
        budget: most bytes of all units together.

    Raises:
        DeliberateError: storages that differ between the two, or a budget below the smallest plan.
    """
    choices = [
        (unit, name, float(size)) for unit, own in enumerate(sizes) for name, size in own.items()
    ]
    if [set(one) for one in sizes] != [set(one) for one in losses] or not choices:
        raise DeliberateError("each unit needs sizes and losses of the same storages")
    least = sum(min(own.values()) for own in sizes)
    if budget < least:
        raise DeliberateError(f"a budget of {budget:.0f} bytes: the smallest plan has {least:.0f}")
    cost = np.array([losses[unit][name] for unit, name, _ in choices])
    one_each = np.array(
        [[float(unit == own) for unit, _, _ in choices] for own in range(len(sizes))]
    )
    largest = max(size for _, _, size in choices)  # in units that the solver's tolerance suits
    bytes_ = np.array([size / largest for _, _, size in choices])
    solved = milp(
        cost,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bytes_, -np.inf, budget / largest),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise DeliberateError(f"no plan was found within {budget:.0f} bytes: {solved.message}")
    taken = [choice for choice, on in zip(choices, solved.x, strict=True) if on > 0.5]
    return tuple(name for _, name, _ in sorted(taken, key=lambda one: one[0]))
