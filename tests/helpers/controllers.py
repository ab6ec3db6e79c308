"""Controllers of a budget on a simulated machine, and what is known of it."""

from __future__ import annotations

from functools import cache

from latency_plant import MAX_PENDING, Table, plant_cost, plant_table

from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetController

COST = plant_cost()
LEAST = COST.least_seconds_per_token(MAX_PENDING)


@cache
def family() -> tuple[Table, list[float]]:
    return plant_table(COST, 60)


class Watched(BudgetController):
    """Also notes the seconds per token that each choice stands for on the unchanged machine."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.chosen: list[float] = []

    def thresholds(self, now, tokens):
        answer = super().thresholds(now, tokens)
        table, expected = family()
        if self.guarding:
            self.chosen.append(LEAST)
        else:
            self.chosen.append(expected[table.lambdas.index(self.lambda_)])
        return answer


def controller(budget: LatencyBudget, **settings) -> Watched:
    table, expected = family()
    return Watched(budget, table, expected, least=LEAST, **settings)


def mean(values) -> float:
    return sum(values) / len(values)
