"""One generation of an evaluation, before it is graded."""

from __future__ import annotations

from dataclasses import dataclass

from deliberate.policies.controller import BudgetReport
from deliberate.trace import GenerationTrace


@dataclass(frozen=True)
class Decoded:
    """One generation: its tokens, its wall clock in seconds, and the trace where there is one.

    `joules` are those of the machine in that time, where it counts them.
    """

    tokens: list[int]
    seconds: float
    prefill_seconds: float
    trace: GenerationTrace | None
    budget: BudgetReport | None = None
    joules: float | None = None
