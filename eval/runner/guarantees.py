"""The guarantees of the modes `certified` and `budget` in a run, and whether they were met."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_records import ADDED


@dataclass(frozen=True)
class CertifiedInfo:
    """A certificate and what the traffic of the run said of it.

    Attributes:
        risk: "token" or "accuracy", see `deliberate.calibration.certificate.Risk`.
        epsilon, delta: with probability at least 1 - delta, risk <= epsilon.
        n, observed: problems that it was tested on, and their mean loss.
        price: lambda, in the unit of the policy per expected disagreement; None = no token exits.
        thresholds: least raw score at which a token exits, per exit; None = never.
        weights, exits, policy, data: SHA-256 that it is bound to.
        conditions: task, prompt, length limit and so on that it holds for.
        departures: those of the conditions that the run differs in, in words.
        limit: share of disagreeing tokens that the drift monitor allows.
        answers, tokens, disagreements: seen by the monitor, warm-up included.
        evidence, alarm_at: of drift, and where the alarm is raised.
        alarm: it was raised; the mode ran no problem after that.
        band: threshold of the deliberation gate; None for its own, or without one. This and `price`
            are keys of `results.json`.
    """

    risk: str
    epsilon: float
    delta: float
    n: int
    observed: float
    price: float | None
    thresholds: list[float | None]
    weights: str
    exits: str
    policy: str
    data: str
    conditions: dict[str, Any]
    departures: list[str]
    limit: float
    answers: int
    tokens: int
    disagreements: int
    evidence: float
    alarm_at: float
    alarm: bool
    band: float | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class BudgetInfo:
    """A latency budget and whether the machine can give it.

    Attributes:
        budget: in words.
        feasibility: one line, for a prompt of median length, before the run.
        feasible, tight, ample: possible at all; by less than 10 %; at full depth too.
        least_ms_per_token: when every token takes the earliest exit, prompt pass included.
        refused: problems refused before decoding, since nothing could have met the budget there.
    """

    budget: str
    feasibility: str
    feasible: bool
    tight: bool
    ample: bool
    least_ms_per_token: float
    refused: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.least_ms_per_token) and self.least_ms_per_token >= 0):
            raise DeliberateError(
                f"least_ms_per_token = {self.least_ms_per_token} must be a finite number of at "
                "least 0"
            )
