"""What `deliberate bench budget` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deliberate.eval.benchmarks.budget_points import BudgetRow, Point, to_dict


@dataclass(frozen=True)
class Sweep:
    """What the sweep found.

    Attributes:
        least_ms, dense_ms: mean per token of the earliest exit and of full depth for a typical
            request, prompt pass included, by the cost model and what the warm-up took against it.
        machine: measured over predicted seconds of the warm-up's dense answers.
        rows: one per budget that answered any request, rising.
        refused: budgets under which every request was refused, in ms.
        points: the baselines on all requests.
        overhead_us: of controller and policy, per token.
        overhead_share: of it in a token's time under the strictest budget of `rows`.
    """

    least_ms: float
    dense_ms: float
    machine: float
    rows: tuple[BudgetRow, ...]
    refused: tuple[float, ...]
    points: tuple[Point, ...]
    overhead_us: float
    overhead_share: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "least_ms_per_token": self.least_ms,
            "dense_ms_per_token": self.dense_ms,
            "machine": self.machine,
            "budgets": [to_dict(row) for row in self.rows],
            "refused_budgets_ms": list(self.refused),
            "baselines": [to_dict(one) for one in self.points],
            "overhead": {"us_per_token": self.overhead_us, "share": self.overhead_share},
        }
