"""The exit policies of guarantees: a certificate's, a budget's controller, exact mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from deliberate.calibration.certificate import Certificate
from deliberate.calibration.stopping_policy import PolicyTable
from deliberate.cost.meter import Work, WorkMeter
from deliberate.cost.model import CostModel
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.policies.budget import LatencyBudget
from deliberate.policies.controller import BudgetController
from deliberate.policies.controller_settings import BudgetReport
from deliberate.policies.drift import DriftMonitor
from deliberate.policies.lengths import LengthPredictor
from deliberate.policies.member_costs import MemberCosts

if TYPE_CHECKING:
    from deliberate.engine.decode_loop import DecodeLoop

# Every so many deep passes the drift monitor compares tokens that exited early with full depth.
MONITOR_EVERY = 4


class CertifiedPolicy(FixedPolicy):
    """A certificate's thresholds, and what the traffic says of it."""

    def __init__(self, certificate: Certificate, drift: DriftMonitor, offset: int) -> None:
        super().__init__(certificate.thresholds, certificate.gate_threshold)
        self.certificate = certificate
        self.drift = drift
        self.offset = offset % MONITOR_EVERY
        self._agreed = self._seen = 0

    def compare(self, agreed: int, seen: int) -> None:
        """Tokens that left early, seen again at full depth."""
        self._agreed += agreed
        self._seen += seen

    def end(self, now: float, tokens: int) -> None:
        """The answer is complete: the drift monitor hears of it."""
        self.drift.update(self._seen - self._agreed, self._seen)
        self._agreed = self._seen = 0


class BudgetPolicy:
    """An `ExitPolicy` around a controller that also tells it what work was run."""

    def __init__(
        self,
        controller: BudgetController,
        table: PolicyTable,
        cost: CostModel,
        exits: Sequence[int],
        observe_speed: Callable[[float], None],
    ) -> None:
        self.controller = controller
        self._table = table
        self._decided = False
        self._observe_speed = observe_speed
        self.report: BudgetReport | None = None
        self.loop: DecodeLoop | None = None
        self._cost = cost
        self._exits = tuple(exits)

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """See `ExitPolicy`."""
        self._decided = False
        self.controller.begin(now, prompt_tokens, max_new_tokens)
        if self.loop is not None:
            batch, gate = self.loop.batch, self.loop.gate
            rounds = None if gate is None else batch.deliberation_rounds
            work = Work(
                self._exits,
                batch.passes,
                reads=batch.reads,
                deliberation_rounds=rounds,
                runs=batch.runs,
            )
            self.controller.watch(WorkMeter(self._cost, work))

    @property
    def gate_threshold(self) -> float | None:
        """The deliberation gate's at the price taken last; its own before the first decision."""
        return self._table.gate_threshold(self.controller.lambda_) if self._decided else None

    def thresholds(self, now: float, tokens: int) -> Sequence[float]:
        """See `ExitPolicy`."""
        self._decided = True
        return self.controller.thresholds(now, tokens)

    def end(self, now: float, tokens: int) -> None:
        """The response is complete."""
        self.report = self.controller.end(now, tokens)
        self._observe_speed(self.report.speed)


class ExactPolicy(FixedPolicy):
    """Exact mode within a budget: the model's own thresholds, and an account at the end."""

    def __init__(
        self,
        thresholds: Sequence[float],
        budget: LatencyBudget,
        expected: MemberCosts,
        lengths: LengthPredictor,
        observe: Callable[[float], None],
    ) -> None:
        """`observe` is told the seconds per token over those expected of exact mode."""
        super().__init__(thresholds)
        self.report: BudgetReport | None = None
        self._budget, self._expected, self._lengths = budget, expected, lengths
        self._observe = observe
        self._began = 0.0

    def begin(self, now: float, prompt_tokens: int, max_new_tokens: int) -> None:
        """See `ExitPolicy`."""
        self._began = now

    def end(self, now: float, tokens: int) -> None:
        """The response is complete."""
        seconds = max(0.0, now - self._began)
        allowed = self._budget.allowed_seconds(tokens)
        planned = self._expected.prompt + max(0, tokens - 1) * self._expected.exact
        speed = seconds / planned if planned > 0 else 1.0
        self.report = BudgetReport(
            budget=str(self._budget),
            met=seconds <= allowed,
            seconds=seconds,
            tokens=tokens,
            allowed_ms=1e3 * allowed,
            guarded=0,
            lambda_=math.inf,
            speed=speed,
        )
        if tokens >= 1:
            self._lengths.observe(tokens)
        if tokens > 1:
            self._observe(speed)
